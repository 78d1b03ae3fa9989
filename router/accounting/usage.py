"""Sends what the meter counted to the ledger about once a second, and renews the leases of budgets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.budgets import Budgets, Limit
from router.accounting.key_samples import SampledKey, Seen
from router.accounting.ledger_sender import LedgerSender
from router.accounting.meter import ROUTER, Fold, Meter, Record
from router.accounting.request_metrics import OK, LabelValues
from router.accounting.usage_batch import COLUMNS, NOTHING, Dimension, UsageColumns, encode
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

REFUSED = Family("ringmesh_budget_refused_total", "counter", "requests refused because a hard budget was used up")
UNNAMED = Family(
    "ringmesh_usage_unnamed_requests_total",
    "counter",
    "requests counted as of the tenant (other), because more tenants came in a day than RINGMESH_USAGE_TENANTS",
)

# What a router counts reaches its spool within a second, so that is the most that is lost if it is killed.
_FLUSH_SECONDS: Final = 0.8
# An idle router reports this often that workers are up.
_UPTIME_SECONDS: Final = 10.0
_MOST_GAP_SECONDS: Final = 60
_BATCH_RECORDS: Final = 2000
_REQUESTS: Final = COLUMNS.index("requests")
_CLOSE_SECONDS: Final = 2.0
_LEASE_SECONDS: Final = 2.0
# Of names in UTF-8. The ledger takes 256 characters; workers and models may have longer ones.
_LONGEST_NAME_BYTES: Final = 256


class Up(NamedTuple):
    """A worker that is up."""

    worker_id: str
    worker_type: str
    region: str


class Usage:
    """The usage of one router. `workers` returns those that are up; `clock` as time.time."""

    def __init__(
        self,
        meter: Meter,
        budgets: Budgets,
        sender: LedgerSender,
        region: str,
        workers: Callable[[], Iterable[Up]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._meter = meter
        self._budgets = budgets
        self._sender = sender
        self._region = _short(region)
        self._workers = workers
        self._clock = clock
        self._stopping = asyncio.Event()
        # Set once the spool could be opened.
        self._opened = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._seen = 0
        self._uptime: dict[tuple[Up, int], int] = {}
        self._uptime_due = 0.0
        # What was spent of budgets when the last two flushes began.
        self._marks_before: list[tuple[Limit, int]] = []
        self._marks: list[tuple[Limit, int]] = []
        self._dropped = 0

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield from self._sender.samples()
        yield Sample(REFUSED, (), self._budgets.refused)
        yield Sample(UNNAMED, (), self._meter.unnamed)

    def start(self) -> None:
        """Ends with `close`."""
        self._sender.start()
        self._tasks = [
            BACKGROUND.start("usage", self._keep_flushing),
            BACKGROUND.start("leases of budgets", self._keep_renewing),
        ]

    async def close(self) -> None:
        """Spools what was counted, and sends it if the ledger takes it within _CLOSE_SECONDS."""
        self._stopping.set()
        if self._tasks:
            await self._tasks[0]
        await BACKGROUND.end(*self._tasks)
        await self.flush()
        await self._sender.close(_CLOSE_SECONDS)

    async def _keep_flushing(self) -> None:
        while not self._stopping.is_set():
            await self.flush()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _FLUSH_SECONDS)

    async def flush(self) -> None:
        """Spools what was counted since the last call. Do not cancel it: what it took from the meter would be lost."""
        marks = self._budgets.marks()
        if self._sender.dropped_requests != self._dropped:
            self._dropped = self._sender.dropped_requests
            self._budgets.lose(self._marks_before, self._marks)
        if self._sender.is_idle:
            self._budgets.delivered(self._marks)
        self._marks_before, self._marks = self._marks, marks
        records, folds = self._meter.take()
        keys, below = self._meter.samples.take()
        now = self._clock()
        self._add_uptime(int(now))
        # The clock may have been set back since: then what is due is farther away than it ever is.
        is_early = now < self._uptime_due <= now + _UPTIME_SECONDS
        if is_early and not (records or folds):
            return
        uptime, self._uptime, self._uptime_due = self._uptime, {}, now + _UPTIME_SECONDS
        samples = [self._sample(name, seen, below) for name, seen in keys.items()]
        for batch, count, requests in await asyncio.to_thread(
            self._encode, records, folds, uptime, samples, int(now * 1000)
        ):
            await self._sender.submit(batch, count, requests)
        if self._sender.router_id:
            self._opened.set()

    def _add_uptime(self, now: int) -> None:
        """Marks the seconds since the last call for what is up now."""
        first = self._seen + 1 if 0 <= now - self._seen <= _MOST_GAP_SECONDS else now
        self._seen = now
        up_now = [*self._workers()]
        if self._sender.router_id:  # the spool is open
            # With the epoch: of a machine that was cloned, both are up.
            up_now.append(Up(f"{self._sender.router_id} {self._sender.epoch}", ROUTER, self._region))
        for up in up_now:
            for second in range(first, now + 1):
                key = (up, second // 60)
                self._uptime[key] = self._uptime.get(key, 0) | 1 << second % 60

    def _encode(
        self,
        records: list[Record],
        folds: dict[LabelValues, Fold],
        uptime: dict[tuple[Up, int], int],
        samples: list[ledger_pb2.KeySample],
        now_ms: int,
    ) -> list[tuple[bytes, int, int]]:
        """Batches, each with the number of its records and of the requests that they stand for. On a thread."""
        times = [
            ledger_pb2.WorkerTime(
                worker_id=_short(up.worker_id),
                worker_type=up.worker_type,
                region=_short(up.region),
                minute=minute,
                seconds=seconds,
            )
            for (up, minute), seconds in uptime.items()
        ]
        usage = [*(fold.record(labels, now_ms) for labels, fold in folds.items()), *records]
        batches = []
        for start in range(0, max(1, len(usage)), _BATCH_RECORDS):
            part = self._columns(usage[start : start + _BATCH_RECORDS])
            batches.append(
                (encode(part, times, key_samples=samples), len(part.dimension), sum(part.columns[_REQUESTS]))
            )
            times, samples = [], []
        return batches

    def _columns(self, records: list[Record]) -> UsageColumns:
        if not records:
            return NOTHING
        labels, kinds, *columns, trace_ids = zip(*records, strict=True)
        numbers: dict[tuple[LabelValues, str], int] = {}
        dimension = [numbers.setdefault(pair, len(numbers)) for pair in zip(labels, kinds, strict=True)]
        return UsageColumns([self._dimension(*pair) for pair in numbers], dimension, columns, trace_ids)

    def _sample(self, name: SampledKey, seen: Seen, below: int) -> ledger_pb2.KeySample:
        model, version, kind, cacheable, key = name
        return ledger_pb2.KeySample(
            model=_short(model),
            version=version,
            region=self._region,
            worker_type=kind,
            cacheable=cacheable,
            key=int.from_bytes(key, "big"),
            below=below,
            at_ms=seen.at_ms,
            requests=seen.requests,
            compute_us=seen.compute_us,
            value_bytes=seen.value_bytes,
        )

    def _dimension(self, labels: LabelValues, worker_type: str) -> Dimension:
        _, model, version, tenant, code, outcome = labels
        shown = outcome if code == OK else ""
        return Dimension(tenant, _short(model), version, self._region, worker_type, shown, code)

    async def _keep_renewing(self) -> None:
        await self._opened.wait()
        if not self._budgets.limits:
            self._budgets.renewed(self._sender.last_leases, [])
        while True:
            request, spent = self._budgets.request(self._sender.router_id, self._sender.epoch)
            answer = await self._sender.lease(request)
            if answer is not None:
                self._budgets.renewed(answer, spent)
            await asyncio.sleep(_LEASE_SECONDS if answer is None else answer.renew_ms / 1000)


def _short(name: str) -> str:
    """As the ledger takes it: it would refuse all of a batch for one name."""
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME_BYTES:
        return name
    return encoded[:_LONGEST_NAME_BYTES].decode(errors="ignore")
