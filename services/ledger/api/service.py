"""`ringmesh.ledger.v1.LedgerService`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import date
from typing import Literal

import grpc
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.ingest.batch import check_name, read
from services.ledger.ingest.producers import BatchFate
from services.ledger.ingest.writer import Writer
from services.ledger.reports import time_range
from services.ledger.reports.budgets import PERIODS, BudgetList
from services.ledger.reports.export import Format
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.rebuild import rebuild
from services.ledger.reports.reports import Reports
from services.ledger.reports.usage_report import UsageQuestion
from services.ledger.storage.budget_table import Budget, BudgetKey
from services.ledger.storage.database import Database
from services.ledger.storage.partitions import Partitions
from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.times import DAY_MS, MINUTE_MS, utc
from services.runtime import faults
from services.runtime.errors import InvalidArgumentError
from services.runtime.rpc.rpc import Context, Service, abort, parse, unary

log = logging.getLogger(__name__)

_ROWS, _MOST_ROWS = 1000, 10_000
_GROUPS = {
    ledger_pb2.GROUP_TENANT: "tenant",
    ledger_pb2.GROUP_MODEL: "model",
    ledger_pb2.GROUP_VERSION: "version",
    ledger_pb2.GROUP_REGION: "region",
    ledger_pb2.GROUP_DAY: "day",
}
_FILTERS: tuple[Literal["tenant", "model", "version", "region"], ...] = ("tenant", "model", "version", "region")
_FORMATS = {
    ledger_pb2.ExportRequest.FORMAT_CSV: Format.CSV,
    ledger_pb2.ExportRequest.FORMAT_PARQUET: Format.PARQUET,
}
_RESULTS = {
    BatchFate.WRITE: ledger_pb2.AppendResponse.RESULT_WRITTEN,
    BatchFate.DUPLICATE: ledger_pb2.AppendResponse.RESULT_DUPLICATE,
    BatchFate.GAP: ledger_pb2.AppendResponse.RESULT_GAP,
}
_DEVICES = {"cpu": ledger_pb2.DEVICE_CPU, "gpu": ledger_pb2.DEVICE_GPU}
_DEVICE_NAMES = {ledger_pb2.DEVICE_UNSPECIFIED: "", **{number: name for name, number in _DEVICES.items()}}


class LedgerService:
    """What routers append and operators read; `clock` as time.time."""

    def __init__(
        self,
        database: Database,
        partitions: Partitions,
        writer: Writer,
        prices: PriceList,
        reports: Reports,
        budgets: BudgetList,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._partitions = partitions
        self._writer = writer
        self._prices = prices
        self._reports = reports
        self._budgets = budgets
        self._clock = clock

    def service(self) -> Service:
        return Service(
            ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"],
            {
                # Made to carry data, and read on a thread.
                "Append": unary(ledger_pb2.AppendRequest, self._append, _any_size),
                "Report": unary(ledger_pb2.ReportRequest, self._report),
                "Bill": unary(ledger_pb2.BillRequest, self._bill),
                "Forecast": unary(ledger_pb2.ForecastRequest, self._forecast),
                "Export": grpc.unary_stream_rpc_method_handler(self._export),
                "ListPrices": unary(ledger_pb2.ListPricesRequest, self._list_prices),
                "SetPrice": unary(ledger_pb2.SetPriceRequest, self._set_price),
                "DeletePrice": unary(ledger_pb2.DeletePriceRequest, self._delete_price),
                "ListBudgets": unary(ledger_pb2.ListBudgetsRequest, self._list_budgets),
                "SetBudget": unary(ledger_pb2.SetBudgetRequest, self._set_budget),
                "DeleteBudget": unary(ledger_pb2.DeleteBudgetRequest, self._delete_budget),
                "Lease": unary(ledger_pb2.LeaseRequest, self._lease),
                "Advise": unary(ledger_pb2.AdviseRequest, self._advise),
                "Rebuild": unary(ledger_pb2.RebuildRequest, self._rebuild),
            },
        )

    async def _append(self, request: ledger_pb2.AppendRequest, _: Context) -> ledger_pb2.AppendResponse:
        batch = await asyncio.to_thread(read, request)
        verdict, last = await self._writer.append(batch)
        return ledger_pb2.AppendResponse(result=_RESULTS[verdict], last_sequence=last)

    async def _report(self, request: ledger_pb2.ReportRequest, _: Context) -> ledger_pb2.ReportResponse:
        if request.limit > _MOST_ROWS:
            raise InvalidArgumentError(f"limit is {request.limit}; at most {_MOST_ROWS}", field="limit")
        limit = request.limit or _ROWS
        filters: dict[str, str] = {name: getattr(request, name) for name in _FILTERS if request.HasField(name)}
        for name, value in filters.items():
            check_name(value, name)
        is_single = ledger_pb2.GROUP_REQUEST in request.by or bool(request.trace_id)
        if is_single:
            if len(request.by) > 1 or request.changes:
                raise InvalidArgumentError("single requests are not grouped or compared", field="by")
            range_ = self._range_of_requests(request)
            question = UsageQuestion(range_, (), filters, limit, allow_unpriced=request.allow_unpriced)
            return await self._reports.requests(question, request.trace_id)
        range_ = time_range.asked(request.from_ms, request.until_ms, self._now_ms(), MINUTE_MS)
        question = UsageQuestion(range_, _groups(request), filters, limit, allow_unpriced=request.allow_unpriced)
        return await self._reports.usage(question, changes=request.changes)

    def _range_of_requests(self, request: ledger_pb2.ReportRequest) -> time_range.TimeRange:
        """With a trace id and no start, all that is kept. Until now: in whole minutes, which are asked for again."""
        from_ms = request.from_ms
        if request.trace_id and not from_ms:
            from_ms = max(self._now_ms() - self._partitions.retention.usage * DAY_MS, 0)
        grain_ms = 1 if request.until_ms else MINUTE_MS
        return time_range.asked(from_ms, request.until_ms, self._now_ms(), grain_ms)

    async def _bill(self, request: ledger_pb2.BillRequest, _: Context) -> ledger_pb2.BillResponse:
        return await self._reports.bill(request.from_ms, request.until_ms, allow_unpriced=request.allow_unpriced)

    async def _forecast(self, _: ledger_pb2.ForecastRequest, __: Context) -> ledger_pb2.ForecastResponse:
        return await self._reports.forecast()

    async def _export(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            request = parse(ledger_pb2.ExportRequest, data)
            form = _FORMATS.get(request.format)
            if form is None:
                raise InvalidArgumentError("format is CSV or PARQUET", field="format")
            async with aclosing(self._reports.export(request.from_ms, request.until_ms, form)) as parts:
                async for part in parts:
                    yield ledger_pb2.ExportResponse(part=part).SerializeToString()
        except Exception as error:
            await abort(context, faults.reported(log, "an export failed", error))

    async def _list_prices(self, _: ledger_pb2.ListPricesRequest, __: Context) -> ledger_pb2.ListPricesResponse:
        async with self._database.reading() as connection:
            book = await self._prices.book(connection)
        return ledger_pb2.ListPricesResponse(prices=[self._price(price) for price in book.prices])

    async def _set_price(self, request: ledger_pb2.SetPriceRequest, _: Context) -> ledger_pb2.SetPriceResponse:
        sent = request.price
        price = Price(
            sent.worker_type,
            sent.from_ms,
            sent.until_ms or NO_END_MS,
            sent.hourly_nano,
            _DEVICE_NAMES.get(sent.device, ""),
            sent.slots or 1,
            sent.power_milliwatts,
            sent.energy_nano_per_kwh,
        )
        await self._prices.set(price, sent.currency, supersede=request.supersede)
        return ledger_pb2.SetPriceResponse()

    async def _delete_price(self, request: ledger_pb2.DeletePriceRequest, _: Context) -> ledger_pb2.DeletePriceResponse:
        await self._prices.delete(request.worker_type, request.from_ms)
        return ledger_pb2.DeletePriceResponse()

    async def _advise(self, request: ledger_pb2.AdviseRequest, _: Context) -> ledger_pb2.AdviseResponse:
        if request.memory_gb_hour_nano < 0:
            raise InvalidArgumentError("memory_gb_hour_nano is 0 or more", field="memory_gb_hour_nano")
        check_name(request.worker_type, "worker_type")
        return await self._reports.advise(request)

    async def _list_budgets(self, _: ledger_pb2.ListBudgetsRequest, __: Context) -> ledger_pb2.ListBudgetsResponse:
        return await self._budgets.states()

    async def _set_budget(self, request: ledger_pb2.SetBudgetRequest, _: Context) -> ledger_pb2.SetBudgetResponse:
        sent = request.budget
        await self._budgets.set(Budget(_budget_key(sent), sent.soft_nano, sent.hard_nano), sent.currency)
        return ledger_pb2.SetBudgetResponse()

    async def _delete_budget(
        self, request: ledger_pb2.DeleteBudgetRequest, _: Context
    ) -> ledger_pb2.DeleteBudgetResponse:
        await self._budgets.delete(_budget_key(request))
        return ledger_pb2.DeleteBudgetResponse()

    async def _lease(self, request: ledger_pb2.LeaseRequest, _: Context) -> ledger_pb2.LeaseResponse:
        check_name(request.router_id, "router_id")
        unsent = {}
        for use in request.uses:
            if use.unsent_nano < 0:
                raise InvalidArgumentError(f"unsent_nano is {use.unsent_nano}; it is 0 or more", field="uses")
            unsent[_budget_key(use)] = use.unsent_nano
        return await self._budgets.lease(request.router_id, request.start_epoch, unsent)

    async def _rebuild(self, request: ledger_pb2.RebuildRequest, _: Context) -> ledger_pb2.RebuildResponse:
        try:
            day = date.fromisoformat(request.day)
        except ValueError:
            raise InvalidArgumentError(f"{request.day!r} is no day, such as 2026-11-29", field="day") from None
        records, requests = await rebuild(self._database, self._partitions, day, utc(self._now_ms()))
        return ledger_pb2.RebuildResponse(records=records, requests=requests)

    def _price(self, price: Price) -> ledger_pb2.Price:
        return ledger_pb2.Price(
            worker_type=price.worker_type,
            from_ms=price.from_ms,
            until_ms=0 if price.until_ms >= NO_END_MS else price.until_ms,
            hourly_nano=price.hourly_nano,
            currency=self._prices.currency,
            device=_DEVICES.get(price.device, ledger_pb2.DEVICE_UNSPECIFIED),
            slots=price.slots,
            power_milliwatts=price.power_milliwatts,
            energy_nano_per_kwh=price.energy_nano_per_kwh,
        )

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _groups(request: ledger_pb2.ReportRequest) -> tuple[str, ...]:
    if len(set(request.by)) != len(request.by):
        raise InvalidArgumentError("a group is named twice", field="by")
    unknown = [group for group in request.by if group not in _GROUPS]
    if unknown:
        raise InvalidArgumentError(f"{unknown[0]} is no group", field="by")
    return tuple(_GROUPS[group] for group in request.by)


def _budget_key(sent: ledger_pb2.Budget | ledger_pb2.DeleteBudgetRequest | ledger_pb2.BudgetUse) -> BudgetKey:
    period = next((name for name, number in PERIODS.items() if number == sent.period), "")
    if not period:
        raise InvalidArgumentError("period is DAY or MONTH", field="period")
    for name in ("tenant", "model"):
        check_name(getattr(sent, name), name)
    return BudgetKey(sent.tenant, sent.model, period)


def _any_size(_: bytes) -> None:
    """The server's own bound holds."""
