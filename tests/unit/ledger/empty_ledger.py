"""A ledger whose database has one price and nothing else, and takes of its callers what PostgreSQL does."""

import re
from contextlib import asynccontextmanager
from datetime import datetime

from services.ledger.api.service import LedgerService
from services.ledger.reports.budgets import BudgetList
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.report_cache import ReportCache
from services.ledger.reports.reports import Reports
from services.ledger.storage.partitions import Partitions, Retention
from services.ledger.storage.price_table import NO_END_MS
from services.ledger.storage.times import utc

NOW = 1_780_000_000.0
_PRICE = ("cpu", utc(0), utc(NO_END_MS), 10**9, "cpu", 2, 0, 0)


class _Connection:
    async def fetch(self, sql, *arguments):
        named = {int(number) for number in re.findall(r"\$(\d+)", sql)}
        assert named == set(range(1, len(arguments) + 1)), sql
        for argument in arguments:
            _check(argument)
        return [_PRICE] if " FROM price " in sql else []

    async def fetchrow(self, sql, *arguments):
        await self.fetch(sql, *arguments)
        return 256, 0

    async def fetchval(self, sql, *arguments):
        await self.fetch(sql, *arguments)
        return utc(0) if "weeks_summed" in sql else 0

    async def execute(self, sql, *arguments):
        await self.fetch(sql, *arguments)
        return "DELETE 0"

    async def executemany(self, sql, rows):
        for row in rows:
            await self.fetch(sql, *row)


def _check(argument):
    if isinstance(argument, str):
        assert "\0" not in argument
        argument.encode()
    elif isinstance(argument, int):
        assert -1 << 63 <= argument < 1 << 63
    elif isinstance(argument, datetime):
        assert argument.tzinfo is not None


class _Database:
    @asynccontextmanager
    async def reading(self, seconds=None):
        yield _Connection()

    writing = changing = leasing = reading


def _service():
    database, clock = _Database(), lambda: NOW
    retention = Retention(30, 30, 400)
    prices, partitions = PriceList(database, "EUR"), Partitions(retention)
    reports = Reports(database, prices, ReportCache(None, ""), retention, clock)
    return LedgerService(database, partitions, None, prices, reports, BudgetList(database, prices, clock), clock)


LEDGER = _service()
