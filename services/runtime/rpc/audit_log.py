"""The audit log: one JSON line for each administrative action, and for each call that was refused.

    {"time": "2026-11-29T18:00:00.000Z", "process": "router", "who": "key ops-1", "method": "…/RepositoryModelLoad",
     "request": {"model_name": "mlp"}, "peer": "ipv4:10.0.0.7:53122", "result": "OK"}

`who` is a key with its id, `local` (an admin network), `service` (with the credential), `browser` (of the console) or
`unknown`. Several processes may append to one file; it may be renamed at any time.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message
from ringmesh.oip.v2 import grpc_service_pb2 as v2

log = logging.getLogger(__name__)

# Callers decide how many calls are refused, so the lines about these are limited.
_REFUSALS_A_SECOND = 10
_LONGEST = 200
_MOST_RECENT = 1000
# A caller without a valid key, token or certificate.
UNKNOWN = "unknown"


class AuditLog:
    """Appends to the file at `path`; None: to the log of the process."""

    def __init__(self, process: str, path: Path | None) -> None:
        self._process = process
        self.path = path
        # The last lines; kept without a file, so that they can be read (audit_service.py).
        self.recent: deque[str] = deque(maxlen=_MOST_RECENT)
        self._second = 0
        self._refusals = 0
        self._suppressed = 0

    def write(self, who: str, method: str, peer: str, result: str, **details: object) -> None:
        """Records that `who`, at `peer`, called `method`, and how it ended."""
        entry = {
            "time": time_text(time.time_ns() // 1_000_000),
            "process": self._process,
            "who": who,
            "method": method,
            **details,
        }
        line = json.dumps({**entry, "peer": peer, "result": result})
        if self.path is None:
            self.recent.append(line)
            log.info("%s", line)
            return
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            log.error("cannot write the audit log (%s): %s", error, line)

    def refused(self, method: str, peer: str, result: str, message: str, who: str = UNKNOWN) -> None:
        """Records a refused call, unless there were too many in this second; the next line counts those."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        if self._refusals > _REFUSALS_A_SECOND:
            self._suppressed += 1
            return
        counted = {"suppressed": self._suppressed} if self._suppressed else {}
        self._suppressed = 0
        self.write(who, method, peer, result, error=message, **counted)


def time_text(at_ms: int) -> str:
    """A time in ms since the Unix epoch, as entries have it."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def summary(request: Message) -> dict[str, Any]:
    """The fields of a request that fit in a line; of large ones, the size."""
    return {field.name: _short(value) for field, value in request.ListFields()}


def _short(value: Any) -> Any:
    if isinstance(value, v2.ModelInferRequest):  # of `Explain`; its tensors are the caller's
        return {"model_name": value.model_name[:_LONGEST], "bytes": value.ByteSize()}
    if isinstance(value, Message):
        is_short = value.ByteSize() <= _LONGEST
        return text_format.MessageToString(value, as_one_line=True) if is_short else f"{value.ByteSize()} bytes"
    if isinstance(value, bytes):
        return value[:_LONGEST].hex()
    if isinstance(value, str):
        return value[:_LONGEST]
    if hasattr(value, "items"):
        return {key[:_LONGEST]: _short(each) for key, each in sorted(value.items())[:20]}
    return value if isinstance(value, bool | int | float) else f"{len(value)} items"
