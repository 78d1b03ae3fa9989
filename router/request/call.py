"""A request on its way through the router."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable

from cache.policy.cache_control import CacheControl
from cache.policy.worth_asking import Subject
from router.admission.caller import ANYBODY
from router.balancing.catalog import ModelEntry
from services.runtime.errors import RingmeshError
from services.runtime.oip.protocol import CallerMetadata
from services.runtime.rpc.rpc import Metadata
from services.runtime.telemetry.tracing import Trace


class Call:
    """One request: its data and metadata, its parsed form, and its outcome.

    `request_hash`: the request's half of the cache key; empty if the answer is not cacheable, and `reason` says why.
    `ring_hash`: position of the sequence on the ring; set only for sequences. `key`: cache key of the answer, made with
    the epochs from before it was computed. `memo_key`: key under which a hit's parsed form is remembered; empty if it
    is not. `deadline` in time.monotonic.
    """

    tenant = ""
    name = ""
    request_id = ""
    request_hash = b""
    ring_hash = b""
    key = b""
    memo_key = b""
    reason = ""
    # Starts to recompute the answer; set if a cached answer is about to expire.
    renew: Callable[[], None] | None = None
    # The execution provider that ran the model; set if the answer was computed for this call.
    provider = ""
    control: CacheControl | None = None
    # The caller's parsed metadata, read at admission; None for internal requests.
    caller_metadata: CallerMetadata | None = None
    model: ModelEntry | None = None
    error: RingmeshError | None = None
    # Set once it is counted as failed: its labels in the metrics, and how many stages its trace had.
    failed: tuple[tuple[str, str, str, str, str, str], int] | None = None
    # Nanoseconds until it began to wait for the caches or a worker; 0: it has not waited.
    router_ns = 0

    def __init__(self, data: bytes, trace: Trace, metadata: Metadata, method: str, deadline: float | None) -> None:
        self.start = time.time_ns()
        self.data = data
        self.trace = trace
        self.metadata = metadata
        self.method = method
        self.deadline = deadline
        self.caller = ANYBODY

    def subject(self) -> Subject:
        """What its use of other tiers is decided by."""
        assert self.model is not None
        return Subject(self.model.name, self.model.digest, len(self.data), self.model.shared_tier)

    def is_late(self) -> bool:
        return self.deadline is not None and self.deadline <= time.monotonic()
