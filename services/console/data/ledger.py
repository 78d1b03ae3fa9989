"""The ledger's reports, for the cost page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from services.console.data.fleet_watch import OPTIONS
from services.runtime.rpc.access import CREDENTIAL
from services.runtime.rpc.client_metadata import sending
from services.runtime.rpc.service_tls import ServiceTls, open_channel

_SECONDS = 5.0
_ROWS = 20
# Of the longest span, which may begin in the middle of one.
_DAYS = 31
# Reports change with every second of traffic; nobody reads money that fast.
_FRESH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Spending:
    """Reports of one span of time. `changes` compares tenants with the span before."""

    tenants: ledger_pb2.ReportResponse
    models: ledger_pb2.ReportResponse
    days: ledger_pb2.ReportResponse
    changes: ledger_pb2.ReportResponse
    bill: ledger_pb2.BillResponse
    forecast: ledger_pb2.ForecastResponse
    budgets: ledger_pb2.ListBudgetsResponse

    @property
    def warnings(self) -> list[str]:
        """What the reports leave out, each once."""
        parts = (self.tenants, self.bill, self.forecast, self.budgets)
        return [*dict.fromkeys(warning for part in parts for warning in part.warnings)]


class LedgerReports:
    """Reads reports from the ledger at `address` (host:port); "" if there is no ledger. `credential`: of the fleet."""

    def __init__(
        self, address: str, credential: str = "", clock: Callable[[], float] = time.time, tls: ServiceTls | None = None
    ) -> None:
        self.address = address
        self._clock = clock
        sends = sending(CREDENTIAL, credential)
        self._channel = open_channel(address, OPTIONS, sends, tls) if address else None
        self._read: dict[int, tuple[float, Spending]] = {}

    async def spending(self, seconds: int) -> Spending:
        """Reports of the last `seconds`, at most a few seconds old. Raises grpc.aio.AioRpcError."""
        assert self._channel is not None
        now = self._clock()
        at, known = self._read.get(seconds, (0.0, None))
        if known is not None and 0 <= now - at < _FRESH_SECONDS:
            return known
        stub = ledger_pb2_grpc.LedgerServiceStub(self._channel)
        begin = int((now - seconds) * 1000)

        async def report(
            group: ledger_pb2.Group.ValueType, limit: int = _ROWS, *, changes: bool = False
        ) -> ledger_pb2.ReportResponse:
            request = ledger_pb2.ReportRequest(
                by=[group], from_ms=begin, limit=limit, changes=changes, allow_unpriced=True
            )
            answer: ledger_pb2.ReportResponse = await stub.Report(request, timeout=_SECONDS)
            return answer

        reports = await asyncio.gather(
            report(ledger_pb2.GROUP_TENANT),
            report(ledger_pb2.GROUP_MODEL),
            report(ledger_pb2.GROUP_DAY, _DAYS),
            report(ledger_pb2.GROUP_TENANT, changes=True),
        )
        bill = await stub.Bill(ledger_pb2.BillRequest(from_ms=begin, allow_unpriced=True), timeout=_SECONDS)
        forecast = await stub.Forecast(ledger_pb2.ForecastRequest(), timeout=_SECONDS)
        budgets = await stub.ListBudgets(ledger_pb2.ListBudgetsRequest(), timeout=_SECONDS)
        spending = Spending(*reports, bill, forecast, budgets)
        self._read[seconds] = now, spending
        return spending

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
