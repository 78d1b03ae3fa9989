"""All reports of a ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import date, timedelta
from functools import partial

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import report_cache, time_range
from services.ledger.reports.advice import advise
from services.ledger.reports.bill import bill
from services.ledger.reports.export import Format, export
from services.ledger.reports.forecast import HISTORY_DAYS, forecast
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.report_cache import Report, ReportCache
from services.ledger.reports.request_report import request_report
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.usage_report import UsageQuestion, usage_report
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.partitions import Retention
from services.ledger.storage.times import DAY_MS, HOUR_MS, MINUTE_MS, day_of, midnight_ms
from services.runtime.errors import ResourceExhaustedError

_MOST_ROWS = 10_000
_LATENCY_US = 100_000
_MOST_EXPORTS = 3


class Reports:
    """Answers from the roll-ups, and from `cache` where nothing changed; `clock` as time.time."""

    def __init__(
        self,
        database: Database,
        prices: PriceList,
        cache: ReportCache,
        retention: Retention,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._prices = prices
        self._cache = cache
        self._retention = retention
        self._clock = clock
        self._exports = asyncio.Semaphore(_MOST_EXPORTS)

    async def usage(self, question: UsageQuestion, *, changes: bool = False) -> ledger_pb2.ReportResponse:
        """By group; the range of `question` is rounded to what is kept. With `changes` beside the time before."""
        range_ = time_range.covered(question.range, self._retention, self._now_ms())
        before = time_range.covered(range_.before, self._retention, self._now_ms()) if changes else None
        question = replace(question, range=range_, before=before)
        ranges = [one for one in (range_, before) if one is not None]
        return await self._answered(
            ledger_pb2.ReportResponse, question, ranges, partial(usage_report, question=question)
        )

    async def requests(self, question: UsageQuestion, trace_id: str) -> ledger_pb2.ReportResponse:
        compute = partial(request_report, question=question, trace_id=trace_id)
        return await self._answered(ledger_pb2.ReportResponse, (question, trace_id), [question.range], compute)

    async def bill(self, from_ms: int, until_ms: int, *, allow_unpriced: bool) -> ledger_pb2.BillResponse:
        """Of whole hours."""
        range_ = time_range.asked(from_ms, until_ms, self._now_ms(), HOUR_MS)
        compute = partial(bill, range_=range_, allow_unpriced=allow_unpriced)
        return await self._answered(ledger_pb2.BillResponse, ("bill", range_, allow_unpriced), [range_], compute)

    async def _answered(
        self,
        kind: type[Report],
        question: object,
        ranges: Sequence[TimeRange],
        compute: Callable[[Connection, PriceBook], Awaitable[Report]],
    ) -> Report:
        """From the cache, or computed; `question` is all that the answer over `ranges` depends on, in its repr."""
        began = time.perf_counter_ns()
        async with self._database.reading() as connection:
            book = await self._prices.book(connection)
            key = report_cache.key(question, book, await report_cache.versions(connection, ranges))
        # No session waits for the cache.
        if (found := await self._cache.get(key, kind)) is not None:
            return found
        async with self._database.reading() as connection:
            # The versions again, from the session that reads the roll-ups: another replica may be behind the first. The
            # report may be newer than they say, and is never older.
            key = report_cache.key(question, book, await report_cache.versions(connection, ranges))
            answer = await compute(connection, book)
        self._cache.put(key, answer, (time.perf_counter_ns() - began) // 1000)
        return answer

    async def advise(self, request: ledger_pb2.AdviseRequest) -> ledger_pb2.AdviseResponse:
        """Of whole minutes that are over."""
        now_ms = self._now_ms()
        range_ = time_range.asked(request.from_ms, request.until_ms or now_ms, now_ms, MINUTE_MS)
        async with self._database.reading() as connection:
            return await advise(
                connection,
                await self._prices.book(connection),
                range_,
                request.worker_type,
                request.latency_us or _LATENCY_US,
                request.memory_gb_hour_nano,
            )

    async def forecast(self) -> ledger_pb2.ForecastResponse:
        now_ms = self._now_ms()
        today = day_of(now_ms)
        month = today.replace(day=1)
        first = min(month, today - timedelta(days=HISTORY_DAYS))
        range_ = time_range.asked(midnight_ms(first), 0, now_ms, MINUTE_MS)
        answer = await self.usage(UsageQuestion(range_, ("day",), {}, _MOST_ROWS, allow_unpriced=True))
        by_day = {date.fromisoformat(row.day): row for row in answer.rows}
        before = {day: row.cost_nano for day, row in by_day.items() if day < today}
        of_month = [row for day, row in by_day.items() if day >= month]
        spent = sum(row.cost_nano for row in of_month)
        expected = forecast(before, today, spent, (now_ms % DAY_MS) / DAY_MS)
        return ledger_pb2.ForecastResponse(
            currency=answer.currency,
            month=f"{today:%Y-%m}",
            spent_nano=spent,
            expected_nano=expected.expected_nano,
            low_nano=expected.low_nano,
            high_nano=expected.high_nano,
            saved_nano=sum(row.saved_nano for row in of_month),
            basis=expected.basis,
            warnings=answer.warnings,
        )

    async def export(self, from_ms: int, until_ms: int, form: Format) -> AsyncGenerator[bytes, None]:
        """Raises ResourceExhaustedError while others are under way: each holds a session for as long as it is read."""
        range_ = time_range.asked(from_ms, until_ms, self._now_ms())
        if self._exports.locked():
            raise ResourceExhaustedError(f"{_MOST_EXPORTS} exports are under way; try again when one has ended")
        async with self._exports, aclosing(export(self._database, range_, form)) as parts:
            async for part in parts:
                yield part

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
