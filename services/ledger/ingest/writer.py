"""The one who writes: what waits is written together, in one transaction, while the next gathers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np

from services.ledger.ingest import key_samples, producers, uptime
from services.ledger.ingest.batch import COLUMNS, UsageBatch, UsageSeries
from services.ledger.ingest.numbers import Margin, Numbers, WorkerName, margins
from services.ledger.ingest.producers import BatchFate
from services.ledger.storage import rollups, usage_rows
from services.ledger.storage.database import Connection, Database, DataRefusedError, MissingPartitionError
from services.ledger.storage.kinds import UsageKind
from services.ledger.storage.partitions import DAYS_AHEAD, Partitions, usage_partition
from services.ledger.storage.rollups import Deltas
from services.ledger.storage.times import DAY_MS, day_of, midnight_ms, milliseconds, utc
from services.ledger.storage.usage_rows import Integers, Rows
from services.runtime.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.runtime.telemetry.metrics import Histogram
from services.runtime.telemetry.supervisor import BACKGROUND

# Together in a transaction. More saves little, and makes the first wait.
_MOST_RECORDS = 20_000
# Waiting; beyond, routers keep them.
_MOST_WAITING = 200_000
# Before the database is tried again.
_PAUSE_SECONDS = 0.1


@dataclass(slots=True)
class _WaitingBatch:
    batch: UsageBatch
    written: asyncio.Future[tuple[BatchFate, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(slots=True)
class WriterCounters:
    """What became of what was sent. `moved`: records of a time that is not kept, counted when they came."""

    records: int = 0
    requests: int = 0
    moved: int = 0
    dropped_requests: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)


class Writer:
    """Writes batches; `clock` as time.time."""

    def __init__(self, database: Database, partitions: Partitions, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._partitions = partitions
        self._clock = clock
        self._queue: deque[_WaitingBatch] = deque()
        self._waiting_records = 0
        self._wake = asyncio.Event()
        self._series = Numbers("series", UsageSeries)
        self._margins = Numbers("margin", Margin)
        self._kinds = Numbers("kind", UsageKind)
        self._workers = Numbers("worker", WorkerName)
        self._task: asyncio.Task[None] | None = None
        self.counters = WriterCounters()
        self.transactions = Histogram()

    @property
    def waiting(self) -> int:
        """Records that wait to be written."""
        return self._waiting_records

    def start(self) -> None:
        self._task = BACKGROUND.start("writer", self._run)

    async def close(self) -> None:
        """What waits is given back as UNAVAILABLE, to be sent again."""
        if self._task is not None:
            await BACKGROUND.end(self._task)
        self._fail(list(self._queue), UnavailableError("the ledger stops; send the batch again"))
        self._queue.clear()

    async def append(self, batch: UsageBatch) -> tuple[BatchFate, int]:
        """WRITE, DUPLICATE or GAP, and the producer's newest batch. Durable when it returns WRITE or DUPLICATE.

        Cancelled: the batch may be written all the same. Raises ResourceExhaustedError where too much waits,
        UnavailableError where the database fails, FailedPreconditionError where another process uses the producer.
        """
        if self._waiting_records >= _MOST_WAITING:
            raise ResourceExhaustedError(f"{self._waiting_records} records wait to be written; send the batch later")
        waiting = _WaitingBatch(batch)
        self._queue.append(waiting)
        self._waiting_records += batch.records
        self._wake.set()
        verdict, last = await asyncio.shield(waiting.written)
        if verdict is BatchFate.CONFLICT:
            raise FailedPreconditionError(
                f"batch {batch.sequence} of {batch.producer.router_id}, epoch {batch.producer.start_epoch}, was "
                "written with other bytes: another process uses this producer; start a new epoch",
                field="start_epoch",
                kind="producer_conflict",
            )
        return verdict, last

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            taken = self._take()
            try:
                await self._write_each(taken)
            except UnavailableError as error:
                self._fail(taken, error)
                # What is remembered may be of a database that is not there any more.
                for numbers in (self._series, self._margins, self._kinds, self._workers):
                    numbers.forget()
                await asyncio.sleep(_PAUSE_SECONDS)
            except BaseException:
                self._fail(taken, UnavailableError("the ledger could not write the batch; send it again"))
                raise

    async def _write_each(self, taken: list[_WaitingBatch]) -> None:
        """All together, or where the database does not take that, one by one: a bad batch holds up no other."""
        try:
            await self._write(taken)
        except DataRefusedError as error:
            if len(taken) > 1:
                for one in taken:
                    await self._write_each([one])
            else:
                self._fail(taken, InvalidArgumentError(f"the batch cannot be written: {error.message}", field="batch"))

    def _take(self) -> list[_WaitingBatch]:
        taken: list[_WaitingBatch] = []
        records = 0
        while self._queue and records < _MOST_RECORDS:
            waiting = self._queue.popleft()
            records += waiting.batch.records
            taken.append(waiting)
        self._waiting_records -= records
        return taken

    def _fail(self, waiting: Sequence[_WaitingBatch], error: Exception) -> None:
        for one in waiting:
            if not one.written.done():
                one.written.set_exception(error)
                # Who sent it may have left.
                one.written.exception()

    async def _write(self, waiting: list[_WaitingBatch]) -> None:
        began = time.perf_counter_ns()
        batches = [one.batch for one in waiting]
        numbers = await self._find(batches)
        try:
            verdicts = await self._transact(batches, numbers)
        except MissingPartitionError:
            # Somebody dropped a partition by hand: made again, once.
            self._partitions.forget()
            verdicts = await self._transact(batches, numbers)
        self.transactions.observe(time.perf_counter_ns() - began)
        for one, (verdict, last) in zip(waiting, verdicts, strict=True):
            self.counters.verdicts[verdict.value] += 1
            if verdict is BatchFate.WRITE:
                self.counters.records += one.batch.records
                self.counters.requests += int(one.batch.columns["requests"].sum())
                self.counters.dropped_requests += one.batch.dropped_requests
            if not one.written.done():
                one.written.set_result((verdict, last))

    async def _find(self, batches: list[UsageBatch]) -> _Numbers:
        names = {name for batch in batches for name in batch.series}
        sampled = {one.series for batch in batches for one in batch.key_samples}
        series = await self._series.of(self._database, names | sampled)
        of_margins = await self._margins.of(self._database, {margin for name in names for margin in margins(name)})
        return _Numbers(
            series,
            {name: [of_margins[margin] for margin in margins(name)] for name in names},
            await self._kinds.of(self._database, {name for batch in batches for name in batch.kinds}),
            await self._workers.of(
                self._database, {WorkerName(*one[:3]) for batch in batches for one in batch.worker_minutes}
            ),
        )

    async def _transact(self, batches: list[UsageBatch], numbers: _Numbers) -> list[tuple[BatchFate, int]]:
        now_ms = int(self._clock() * 1000)
        days: set[date] = set()
        async with self._database.writing() as connection:
            marks = await producers.locked(connection, batches)
            verdicts = []
            accepted = []
            for batch in batches:
                mark = marks[batch.producer]
                verdict = mark.judge(batch)
                verdicts.append((verdict, mark.last))
                if verdict is BatchFate.WRITE:
                    accepted.append((batch, mark.id))
            if accepted:
                tables = [_Table(batch, producer, numbers) for batch, producer in accepted if batch.records]
                if tables:
                    days = await self._write_records(connection, tables, now_ms)
                await self._partitions.ensure(connection, {day_of(now_ms)})
                await producers.remember(connection, ((mark, batch) for batch, mark in accepted), utc(now_ms))
                observed = await self._write_observed(connection, [batch for batch, _ in accepted], numbers, now_ms)
                if changed := days | observed:
                    await rollups.touch(connection, changed)
                await producers.advance(connection, marks.values())
        self._partitions.made(days)
        return verdicts

    async def _write_records(self, connection: Connection, tables: list[_Table], now_ms: int) -> set[date]:
        at_ms = np.concatenate([table.batch.at_ms for table in tables])
        today = day_of(now_ms)
        # Of a time that is not kept, or not yet: counted now, rather than lost.
        first = self._partitions.retention.first_usage_day(today)
        past_end_ms = (now_ms // DAY_MS + DAYS_AHEAD + 1) * DAY_MS
        strange = (at_ms < midnight_ms(first)) | (at_ms >= past_end_ms)
        self.counters.moved += int(strange.sum())
        at_ms[strange] = now_ms
        rows = usage_rows.empty(len(at_ms))
        end = 0
        for table in tables:
            begin, end = end, end + table.batch.records
            table.fill(rows[begin:end])
        usage_rows.set_times(rows, at_ms)
        day_numbers = at_ms // DAY_MS
        days = {day_of(int(number) * DAY_MS) for number in np.unique(day_numbers)}
        await self._partitions.ensure(connection, days)
        for number in np.unique(day_numbers):
            await _copy(connection, usage_partition(day_of(int(number) * DAY_MS)), rows[day_numbers == number])
        measures = {name: np.concatenate([table.measure(name) for table in tables]) for name in rollups.MEASURES}
        minutes_from_ms = midnight_ms(self._partitions.retention.first_minute_day(today))
        weeks_until_ms = milliseconds(await rollups.sum_weeks(connection, self._partitions, now_ms))
        series = np.concatenate([table.series for table in tables])
        await Deltas("rollup", at_ms, series, measures).apply(connection, minutes_from_ms, weeks_until_ms)
        of_margins = np.concatenate([table.margins for table in tables], axis=1)
        every = {name: np.tile(measure, len(of_margins)) for name, measure in measures.items()}
        deltas = Deltas("margin", np.tile(at_ms, len(of_margins)), of_margins.ravel(), every)
        await deltas.apply(connection, minutes_from_ms, weeks_until_ms)
        return days

    async def _write_observed(
        self, connection: Connection, batches: list[UsageBatch], numbers: _Numbers, now_ms: int
    ) -> set[date]:
        """Which workers were up, and samples of keys, as far as they are kept. Returns the days whose bill changes."""
        retention, today = self._partitions.retention, day_of(now_ms)
        end_ms = (now_ms // DAY_MS + DAYS_AHEAD + 1) * DAY_MS
        # Seconds of a time whose seconds are not kept cannot be told from those that were counted.
        first_ms = midnight_ms(retention.first_usage_day(today))
        minutes = [one for batch in batches for one in batch.worker_minutes if first_ms <= one.at_ms < end_ms]
        first_ms = midnight_ms(retention.first_minute_day(today))
        samples = [one for batch in batches for one in batch.key_samples if first_ms <= one.at_ms < end_ms]
        times = [*(one.at_ms for one in minutes), *(one.at_ms for one in samples)]
        await self._partitions.ensure(connection, {day_of(at_ms) for at_ms in times})
        await uptime.add(connection, minutes, numbers.workers)
        await key_samples.add(connection, samples, numbers.series)
        return {day_of(one.at_ms) for one in minutes}


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Of what some batches name. `margins`: of series that have records, one a cube."""

    series: dict[UsageSeries, int]
    margins: dict[UsageSeries, list[int]]
    kinds: dict[UsageKind, int]
    workers: dict[WorkerName, int]


class _Table:
    """The records of a batch as they go to the database."""

    def __init__(self, batch: UsageBatch, producer: int, numbers: _Numbers) -> None:
        self.batch = batch
        self._producer = producer
        self.series: Integers = np.array([numbers.series[name] for name in batch.series], np.int64)[batch.dimension]
        # A row a cube.
        self.margins = np.array([numbers.margins[name] for name in batch.series], np.int64).T[:, batch.dimension]
        self._kind = np.array([numbers.kinds[name] for name in batch.kinds], np.int64)[batch.dimension]
        self._is_hit = np.array([name.is_hit for name in batch.kinds], np.int64)[batch.dimension]
        self._is_error = np.array([name.is_error for name in batch.kinds], np.int64)[batch.dimension]

    def fill(self, rows: Rows) -> None:
        """All but their times."""
        for name in COLUMNS:
            rows[name] = self.batch.columns[name]
        rows["sequence"] = self.batch.sequence
        rows["producer"] = self._producer
        rows["series"] = self.series
        rows["kind"] = self._kind
        rows["trace_id"] = np.frombuffer(self.batch.trace_ids, "V16")

    def measure(self, name: str) -> Integers:
        """What each record adds to a measure of the roll-ups."""
        columns = self.batch.columns
        match name:
            case "hits":
                return columns["requests"] * self._is_hit
            case "errors":
                return columns["requests"] * self._is_error
            case "error_us":
                return columns["compute_us"] * self._is_error
            case _:
                return columns[name]


async def _copy(connection: Connection, table: str, rows: Rows) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield usage_rows.as_copy(rows)

    await connection.copy_to_table(table, source=pieces(), columns=usage_rows.NAMES, format="binary")
