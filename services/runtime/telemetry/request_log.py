"""A rate-limited log line for each failed or slow request; lines above the limit are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import grpc

from services.runtime.telemetry.logs import FIELDS
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.token_bucket import TokenBucket

log = logging.getLogger(__name__)

SUPPRESSED = Family(
    "ringmesh_log_suppressed_total", "counter", "failed and slow requests left out of the log, see RINGMESH_LOG_FORMAT"
)

_LINES_A_SECOND = 10.0
_BURST = 20.0
_LONGEST_ERROR = 500
# Codes caused by the caller; the others are faults of the server or its platform.
_CALLERS = frozenset(
    code.name
    for code in (
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    )
)


class RequestLog:
    """Limits log lines by a token bucket. `clock` is like time.monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._bucket = TokenBucket(_LINES_A_SECOND, _BURST, clock)
        self._suppressed = 0
        self._unreported = 0

    def write(self, *, code: str, error: str, duration_ns: int, **fields: str) -> None:
        """Logs a request that failed with `code`, or was slow if `code` is OK. Tensor data is never logged."""
        if self._bucket.take():
            self._suppressed += 1
            self._unreported += 1
            return
        level = logging.INFO if code == "OK" or code in _CALLERS else logging.WARNING
        shown: dict[str, object] = {"code": code, "duration_ms": round(duration_ns / 1e6, 3), **fields}
        if error:
            shown["error"] = error[:_LONGEST_ERROR]
        if self._unreported:
            shown["suppressed"] = self._unreported
            self._unreported = 0
        log.log(level, "a request was slow" if code == "OK" else "a request failed", extra={FIELDS: shown})

    def samples(self) -> Iterator[Sample]:
        yield Sample(SUPPRESSED, (), self._suppressed)
