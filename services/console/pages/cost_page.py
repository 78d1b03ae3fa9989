"""The cost page: what was spent, by whom and on what, what the cache saved, and what the month will cost."""

from __future__ import annotations

from datetime import UTC, datetime

import grpc
from ringmesh.ledger.v1 import ledger_pb2
from starlette.requests import Request

from services.console.data.ledger import LedgerReports
from services.console.pages.live import Context

_DAY_SECONDS = 86400
SPANS = {
    "24h": ("last 24 hours", _DAY_SECONDS),
    "7d": ("last 7 days", 7 * _DAY_SECONDS),
    "30d": ("last 30 days", 30 * _DAY_SECONDS),
}
_PERIODS = {ledger_pb2.PERIOD_DAY: "day", ledger_pb2.PERIOD_MONTH: "month"}


async def contents(ledger: LedgerReports, request: Request) -> Context:
    """Returns the context of `cost.html`. `problem` says why there are no reports; "" if there are."""
    span = request.query_params.get("span", "")
    if span not in SPANS:
        span = "30d"
    context = {"spans": SPANS, "span": span, "problem": "", "spending": None, "periods": _PERIODS, "day": _day}
    if not ledger.address:
        return context | {"problem": "No ledger is configured: RINGMESH_LEDGER_ADDRESS of the console names one."}
    try:
        return context | {"spending": await ledger.spending(SPANS[span][1])}
    except grpc.aio.AioRpcError as error:
        return context | {"problem": f"The ledger at {ledger.address} does not answer: {error.details()}."}


def _day(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d}"
