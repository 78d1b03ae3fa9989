"""Questions of operators: reports, prices and budgets of the ledger, the audit log, searches of the console."""

import asyncio
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.message import DecodeError
from ringmesh.audit.v1 import audit_pb2
from ringmesh.ledger.v1 import ledger_pb2
from starlette.requests import Request

from services.console.data.sources import Sources
from services.console.data.trace_store import TraceStore
from services.console.pages import traces_page
from services.ledger.storage.times import utc
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from services.runtime.rpc.audit_log import AuditLog
from services.runtime.rpc.audit_service import pages
from services.runtime.rpc.rpc import parse
from tests.fuzz.target import target
from tests.unit.console.data.test_trace_store import span
from tests.unit.ledger.empty_ledger import LEDGER, NOW

_LOOP = asyncio.new_event_loop()


_METHODS = (
    (ledger_pb2.ReportRequest, LEDGER._report),
    (ledger_pb2.BillRequest, LEDGER._bill),
    (ledger_pb2.AdviseRequest, LEDGER._advise),
    (ledger_pb2.RebuildRequest, LEDGER._rebuild),
    (ledger_pb2.SetPriceRequest, LEDGER._set_price),
    (ledger_pb2.DeletePriceRequest, LEDGER._delete_price),
    (ledger_pb2.SetBudgetRequest, LEDGER._set_budget),
    (ledger_pb2.DeleteBudgetRequest, LEDGER._delete_budget),
    (ledger_pb2.LeaseRequest, LEDGER._lease),
)
_BEGIN = int(NOW - 7200) * 1000 // 3_600_000 * 3_600_000
_BUDGET = ledger_pb2.Budget(tenant="t", model="m", period=ledger_pb2.PERIOD_DAY, hard_nano=5, currency="EUR")
_USE = ledger_pb2.BudgetUse(tenant="t", period=ledger_pb2.PERIOD_MONTH, unsent_nano=7)
_GROUPS = [ledger_pb2.GROUP_TENANT, ledger_pb2.GROUP_DAY, ledger_pb2.GROUP_MODEL]
_ASKED = (
    (0, ledger_pb2.ReportRequest(by=_GROUPS, from_ms=_BEGIN, tenant="a'b", region="", limit=7, changes=True)),
    (0, ledger_pb2.ReportRequest(from_ms=1, until_ms=_BEGIN * 2, version="1", changes=True)),
    (0, ledger_pb2.ReportRequest(by=[ledger_pb2.GROUP_REQUEST], from_ms=_BEGIN, until_ms=_BEGIN + 9, model="m")),
    (0, ledger_pb2.ReportRequest(trace_id="0af76519", allow_unpriced=True)),
    (1, ledger_pb2.BillRequest(from_ms=_BEGIN - 7)),
    (2, ledger_pb2.AdviseRequest(from_ms=_BEGIN, worker_type="cpu", latency_us=5, memory_gb_hour_nano=5)),
    (3, ledger_pb2.RebuildRequest(day=f"{utc(_BEGIN):%Y-%m-%d}")),
    (4, ledger_pb2.SetPriceRequest(
        price=ledger_pb2.Price(worker_type="cpu", from_ms=_BEGIN, hourly_nano=5, currency="EUR"), supersede=True
    )),
    (5, ledger_pb2.DeletePriceRequest(worker_type="cpu", from_ms=0)),
    (6, ledger_pb2.SetBudgetRequest(budget=_BUDGET)),
    (7, ledger_pb2.DeleteBudgetRequest(tenant="t", period=ledger_pb2.PERIOD_DAY)),
    (8, ledger_pb2.LeaseRequest(router_id="r", uses=[_USE, _USE])),
    (0, ledger_pb2.ReportRequest(from_ms=_BEGIN, tenant="a\0b")),
    (2, ledger_pb2.AdviseRequest(from_ms=_BEGIN, worker_type="\0")),
    (7, ledger_pb2.DeleteBudgetRequest(model="\0", period=ledger_pb2.PERIOD_MONTH)),
)  # fmt: skip


@target(
    "ledger",
    [bytes([number]) + request.SerializeToString() for number, request in _ASKED],
    InvalidArgumentError, NotFoundError, AlreadyExistsError,
)  # fmt: skip
def ledger(data):
    """Whatever is asked, the database is given what it takes: its refusal would be told as its failure."""
    kind, call = _METHODS[data[0] % len(_METHODS) if data else 0]
    answer = _LOOP.run_until_complete(call(parse(kind, data[1:]), None))
    assert answer.IsInitialized()


_HELD = tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-audit-")
_AUDIT = AuditLog("router", Path(_HELD.name, "audit.jsonl"))
_TIMES = range(1_780_000_000_000, 1_780_000_040_000, 1000)
_AUDIT.path.write_text(
    "".join(
        json.dumps(
            {
                "time": datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")[:23] + "Z",
                "process": "router",
                "who": f"key {at_ms % 3000}",
                "method": "x/Purge" if at_ms % 2000 else "x/RepositoryModelLoad",
                "request": {"model": "m"},
                "result": "OK",
            }
        )
        + "\n"
        for at_ms in _TIMES
    )
    + '{"time": "2026-05-28T20:26:4'
)


@target(
    "audit-list",
    [
        audit_pb2.ListRequest(who="key 1", method="Purge", limit=5, from_ms=_TIMES[7]).SerializeToString(),
        audit_pb2.ListRequest(from_ms=_TIMES[3], until_ms=_TIMES[9]).SerializeToString(),
        audit_pb2.ListRequest(until_ms=253_402_300_799_999, limit=1 << 31).SerializeToString(),
    ],
    InvalidArgumentError, DecodeError,
)  # fmt: skip
def audit_list(data):
    """The entries that were asked for, all of them up to the limit."""
    asked = audit_pb2.ListRequest.FromString(data)
    found = [entry for page in pages(_AUDIT, asked) for entry in page]
    wanted = [
        at_ms
        for at_ms in reversed(_TIMES)
        if asked.from_ms <= at_ms < (asked.until_ms or 1 << 62)
        and asked.who in f"key {at_ms % 3000}"
        and asked.method in ("x/Purge" if at_ms % 2000 else "x/RepositoryModelLoad")
    ]
    assert [entry.at_ms for entry in found] == wanted[: asked.limit or None]


_TRACES = TraceStore(max_bytes=1 << 20, max_traces=100)
for _number in range(1, 7):
    _TRACES.add(
        "ringmesh-router",
        span(
            _number,
            model=f"m{_number % 2}",
            tenant=f"t{_number % 3}",
            end=4**_number,
            error="it <failed>" if _number == 5 else "",
        ),
    )
_SOURCES = Sources(None, None, None, _TRACES, "", None)


@target(
    "trace-search",
    [
        b"model=m1&tenant=t2&min_ms=2&max_ms=1e3&text=Infer&sort=slowest&compare=%3Cb%3E",
        b"min_ms=nan&max_ms=-inf&model=%F0%9F%A6%8A",
        b"min_ms=1_0&max_ms=%D9%A3&key=&worker=&cache=hit",
    ],
)
def trace_search(data):
    """A search finds what it says, and each bar of its histogram leads to traces."""
    found = _search(data)
    query = found["query"]
    shown = [summary for summary in _TRACES.summaries() if not found["problem"] and query.matches(summary)]
    assert {one.trace_id for one in found["found"]} == {one.trace_id for one in shown}
    assert all(query.model in ("", one.model) and query.tenant in ("", one.tenant) for one in shown)
    for bar in found["histogram"]:
        assert _search(bar["link"].removeprefix("/traces?").encode())["count"] >= bar["count"]


def _search(query):
    scope = {"type": "http", "method": "GET", "path": "/traces", "query_string": query, "headers": []}
    return _LOOP.run_until_complete(traces_page.listing(_SOURCES, Request(scope)))
