"""A request on its way through the router."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable

from cache.policy.cache_control import CacheControl
from router.admission.caller import ANYBODY
from router.balancing.catalog import ModelEntry
from services.runtime.errors import RingmeshError
from services.runtime.rpc.rpc import Metadata
from services.runtime.telemetry.tracing import Trace


class Admitted:
    """A request on its way. `request_hash` is b"" where the answer is not kept, `place` but for sequences."""

    tenant = ""
    name = ""
    request_id = ""
    request_hash = b""
    place = b""
    reason = ""
    stale = False
    # Has the answer computed anew, where it was found that it is time to.
    renew: Callable[[], None] | None = None
    # What ran the model, where it was computed for this call.
    provider = ""
    control: CacheControl | None = None
    model: ModelEntry | None = None
    error: RingmeshError | None = None

    def __init__(self, data: bytes, trace: Trace, metadata: Metadata, method: str) -> None:
        self.start = time.time_ns()
        self.data = data
        self.trace = trace
        self.metadata = metadata
        self.method = method
        self.caller = ANYBODY
