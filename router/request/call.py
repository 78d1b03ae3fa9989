"""A request on its way through the router."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable

from cache.policy.cache_control import CacheControl
from router.admission.caller import ANYBODY
from router.balancing.catalog import ModelEntry
from services.runtime.errors import RingmeshError
from services.runtime.oip.protocol import Told
from services.runtime.rpc.rpc import Metadata
from services.runtime.telemetry.tracing import Trace


class Call:
    """One request: what it says, what it asks for, and what became of it.

    `request_hash`: its half of the key; empty if the answer is not cacheable, for `reason`. `ring_hash`: where on the
    ring its sequence is; set only for sequences. `key`: where the answer is filed, by the purges from before it was
    computed. `memo_key`: where to remember what the request asks for, if it is a hit. `deadline` in time.monotonic.
    """

    tenant = ""
    name = ""
    request_id = ""
    request_hash = b""
    ring_hash = b""
    key = b""
    memo_key = b""
    reason = ""
    # Computes the answer anew, if it was found and will soon be too old.
    renew: Callable[[], None] | None = None
    # The execution provider that ran the model, if it was computed for this call.
    provider = ""
    control: CacheControl | None = None
    # What the caller says in metadata, until it is admitted.
    told: Told | None = None
    model: ModelEntry | None = None
    error: RingmeshError | None = None

    def __init__(self, data: bytes, trace: Trace, metadata: Metadata, method: str, deadline: float | None) -> None:
        self.start = time.time_ns()
        self.data = data
        self.trace = trace
        self.metadata = metadata
        self.method = method
        self.deadline = deadline
        self.caller = ANYBODY

    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and self.deadline <= time.monotonic()
