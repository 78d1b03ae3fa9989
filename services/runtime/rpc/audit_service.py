"""`ringmesh.audit.v1.AuditService`: reads the audit log, the newest entries first."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from ringmesh.audit.v1 import audit_pb2

from services.runtime import faults
from services.runtime.errors import InvalidArgumentError
from services.runtime.request_limits import check_size
from services.runtime.rpc.audit_log import AuditLog, time_text
from services.runtime.rpc.rpc import Context, Handler, Service, abort, parse

log = logging.getLogger(__name__)

# Read at once: about 300 lines, parsed in 2 ms.
_BLOCK = 64 << 10
# Processes that share a file, and steps of the clock, may leave entries out of order by that much.
_DISORDER_MS = 60_000
_LAST_MS = 253_402_300_799_999  # the year 9999


def service(audit: AuditLog) -> Service:
    """Returns the service for the log of this process."""

    async def listing(data: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            check_size(data)
            found = pages(audit, parse(audit_pb2.ListRequest, data))
            # On a thread, block by block: a log may be large, and this process may serve requests.
            while (entries := await asyncio.to_thread(next, found, None)) is not None:
                if entries:
                    yield audit_pb2.ListResponse(entries=entries).SerializeToString()
        except Exception as error:
            await abort(context, faults.reported(log, "reading the audit log failed", error))

    handlers: dict[str, Handler] = {"List": grpc.unary_stream_rpc_method_handler(listing)}
    return Service(audit_pb2.DESCRIPTOR.services_by_name["AuditService"], handlers)


def pages(audit: AuditLog, request: audit_pb2.ListRequest) -> Iterator[list[audit_pb2.Entry]]:
    """Yields the entries that `request` asks for, a block of the log at a time. Raises InvalidArgumentError."""
    for field in ("from_ms", "until_ms"):
        if not 0 <= getattr(request, field) <= _LAST_MS:
            raise InvalidArgumentError(f"{field} is {getattr(request, field)}, which is no time", field=field)
    return _pages(audit, request)


def _pages(audit: AuditLog, request: audit_pb2.ListRequest) -> Iterator[list[audit_pb2.Entry]]:
    # Times in the log have one format, so their texts are ordered as they are.
    begin, end = time_text(request.from_ms), time_text(request.until_ms or _LAST_MS)
    oldest = time_text(max(request.from_ms - _DISORDER_MS, 0))
    left = request.limit or -1
    blocks = [[*audit.recent]] if audit.path is None else _blocks(audit.path)
    for block in blocks:
        found: list[audit_pb2.Entry] = []
        for entry in _parsed(reversed(block)):
            if entry["time"] < oldest or left == 0:
                yield found
                return
            if (
                begin <= entry["time"] < end
                and request.who in entry.get("who", "")
                and request.method in entry.get("method", "")
            ):
                found.append(_entry(entry))
                left -= 1
        yield found


def _blocks(path: Path) -> Iterator[list[str]]:
    """Yields the lines of a file, in blocks from its end."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield [line.decode(errors="replace") for line in lines]
            end = start
        yield [rest.decode(errors="replace")]


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields the entries; a line that is not one, such as one being written, is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("time"), str):
            yield entry


def _entry(line: dict[str, Any]) -> audit_pb2.Entry:
    about = line.get("request")
    texts = {name: str(line.get(name, "")) for name in ("process", "who", "method", "peer", "result", "error")}
    return audit_pb2.Entry(
        at_ms=int(datetime.fromisoformat(line["time"]).astimezone(UTC).timestamp() * 1000),
        request=json.dumps(about) if about else "",
        suppressed=int(line.get("suppressed", 0)),
        **texts,
    )
