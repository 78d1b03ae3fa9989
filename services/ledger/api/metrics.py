"""The ledger, as metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.ingest.writer import Writer
from services.ledger.reports.budgets import PERIODS, BudgetList
from services.ledger.reports.report_cache import ReportCache
from services.ledger.storage.database import Database
from services.runtime.telemetry.metrics import Family, Sample

RECORDS = Family("ringmesh_ledger_records_total", "counter", "usage records written")
REQUESTS = Family("ringmesh_ledger_requests_total", "counter", "requests that those stand for")
BATCHES = Family(
    "ringmesh_ledger_batches_total",
    "counter",
    "batches by what became of them: write, duplicate, gap, conflict",
    ("result",),
)
MOVED = Family(
    "ringmesh_ledger_moved_records_total", "counter", "records of a time that is not kept, counted when they came"
)
DROPPED = Family("ringmesh_ledger_dropped_requests_total", "counter", "requests that routers could not account for")
WAITING = Family("ringmesh_ledger_waiting_records", "gauge", "records received and not yet written")
TRANSACTIONS = Family(
    "ringmesh_ledger_transaction_seconds", "histogram", "time to write what waited, in one transaction"
)
DATABASE = Family("ringmesh_ledger_database_up", "gauge", "1 once the database was reached and its schema is ours")
CACHE = Family(
    "ringmesh_ledger_report_cache_total", "counter", "reports looked up in the cache: hit, miss, failure", ("result",)
)


BUDGET = Family(
    "ringmesh_ledger_budget_ratio",
    "gauge",
    "what is spent of a budget in its period, as part of its bound; bound: soft, hard",
    ("tenant", "model", "period", "bound"),
)
_LOOK_SECONDS = 10.0
_PERIOD_NAMES = {number: name for name, number in PERIODS.items()}


class LedgerMetrics:
    """Reads the counters of its parts, and now and then the budgets."""

    def __init__(self, database: Database, writer: Writer, cache: ReportCache, budgets: BudgetList) -> None:
        self._budgets = budgets
        self._states: Iterable[ledger_pb2.BudgetState] = ()
        self._database = database
        self._writer = writer
        self._cache = cache

    async def look(self) -> None:
        """Updates the budget metrics until cancelled."""
        while True:
            self._states = (await self._budgets.states()).budgets
            await asyncio.sleep(_LOOK_SECONDS)

    def samples(self) -> Iterator[Sample]:
        for state in self._states:
            budget = state.budget
            labels = (budget.tenant, budget.model, _PERIOD_NAMES[budget.period])
            for bound, nano in (("soft", budget.soft_nano), ("hard", budget.hard_nano)):
                if nano:
                    yield Sample(BUDGET, (*labels, bound), state.spent_nano / nano)
        counters = self._writer.counters
        yield Sample(RECORDS, (), counters.records)
        yield Sample(REQUESTS, (), counters.requests)
        yield Sample(MOVED, (), counters.moved)
        yield Sample(DROPPED, (), counters.dropped_requests)
        for verdict, count in counters.verdicts.items():
            yield Sample(BATCHES, (verdict,), count)
        yield Sample(WAITING, (), self._writer.waiting)
        yield Sample(TRANSACTIONS, (), self._writer.transactions.buckets())
        yield Sample(DATABASE, (), self._database.is_open)
        for result, count in (
            ("hit", self._cache.hits),
            ("miss", self._cache.misses),
            ("failure", self._cache.failures),
        ):
            yield Sample(CACHE, (result,), count)
