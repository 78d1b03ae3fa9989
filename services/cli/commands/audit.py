"""`ringmesh audit`: shows the audit log of a process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import grpc
from rich.text import Text
from ringmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.cli.commands import running
from services.cli.commands.cost import period
from services.runtime.rpc.audit_log import time_text


def question(since: str | None, until: str | None, who: str, method: str, limit: int) -> audit_pb2.ListRequest:
    """What a process is asked. Raises CommandError."""
    return audit_pb2.ListRequest(**period(since or "1h", until), who=who, method=method, limit=limit)


def entries(address: str, asked: audit_pb2.ListRequest) -> list[audit_pb2.Entry]:
    """The entries, the newest first. Raises CommandError."""

    def call(channel: grpc.Channel) -> list[audit_pb2.Entry]:
        pages = audit_pb2_grpc.AuditServiceStub(channel).List(asked)
        return [entry for page in pages for entry in page.entries]

    return running.ask(address, "process", call)


def lines(found: Sequence[audit_pb2.Entry]) -> Iterator[str]:
    for entry in found:
        line = {"time": time_text(entry.at_ms)}
        line |= {name: getattr(entry, name) for name in ("process", "who", "method")}
        more = {"request": json.loads(entry.request or "{}"), "error": entry.error, "suppressed": entry.suppressed}
        line |= {name: value for name, value in more.items() if value}
        yield json.dumps({**line, "peer": entry.peer, "result": entry.result})


def listing(found: Sequence[audit_pb2.Entry]) -> Text:
    """One line for each entry, whole, however wide the terminal is; of a method its name, as in the console."""
    rows = [("time", "process", "who", "from", "result", "method", "about")]
    for entry in found:
        about = (entry.error or ("" if entry.request == "{}" else entry.request)).replace("\n", " ")
        named = (entry.process, entry.who, entry.peer, entry.result, entry.method.rpartition("/")[2])
        rows.append((time_text(entry.at_ms), *named, about))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    padded = (zip(row, (*widths, 0), strict=True) for row in rows)
    return Text("\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded))
