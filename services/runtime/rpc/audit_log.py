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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

log = logging.getLogger(__name__)

# Callers decide how many calls are refused, so the lines about these are limited.
_REFUSALS_A_SECOND = 10
_LONGEST = 200


class AuditLog:
    """Appends to the file at `path`; None: to the log of the process."""

    def __init__(self, process: str, path: Path | None) -> None:
        self._process = process
        self._path = path
        self._second = 0
        self._refusals = 0
        self._suppressed = 0

    def write(self, who: str, method: str, peer: str, result: str, **more: object) -> None:
        """Records that `who`, at `peer`, called `method`, and how it ended."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": now, "process": self._process, "who": who, "method": method, **more}
        line = json.dumps({**entry, "peer": peer, "result": result})
        if self._path is None:
            log.info("%s", line)
            return
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            log.error("cannot write the audit log (%s): %s", error, line)

    def refused(self, method: str, peer: str, result: str, message: str, who: str = "unknown") -> None:
        """Records a refused call, unless there were too many in this second; the next line counts those."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        if self._refusals > _REFUSALS_A_SECOND:
            self._suppressed += 1
            return
        more = {"suppressed": self._suppressed} if self._suppressed else {}
        self._suppressed = 0
        self.write(who, method, peer, result, error=message, **more)


def summary(request: Message) -> dict[str, Any]:
    """The fields of a request that fit in a line; of large ones, the size."""
    return {field.name: _short(value) for field, value in request.ListFields()}


def _short(value: Any) -> Any:
    if isinstance(value, Message):
        return str(value).strip() if value.ByteSize() <= _LONGEST else f"{value.ByteSize()} bytes"
    if isinstance(value, bytes):
        return value[:_LONGEST].hex()
    if isinstance(value, str):
        return value[:_LONGEST]
    if hasattr(value, "items"):
        return {key[:_LONGEST]: _short(each) for key, each in sorted(value.items())[:20]}
    return value if isinstance(value, bool | int | float) else f"{len(value)} items"
