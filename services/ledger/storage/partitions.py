"""Time partitions: made in advance, made again where somebody dropped one, and dropped when their time is over."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from services.ledger.storage.database import Connection, Database
from services.ledger.storage.times import next_month, week_of

log = logging.getLogger(__name__)

DAYS_AHEAD = 3
# Dropped with the records, and with the sums by minute.
_AS_RECORDS = ("usage", "worker_minute", "batch_digest")
_AS_MINUTES = ("rollup_minute", "margin_minute", "key_sample")
_OF_MONTHS = ("rollup_hour", "rollup_day", "margin_hour", "margin_day")
# A week is in the month in which it begins.
_OF_WEEKS = ("rollup_week", "margin_week")


@dataclass(frozen=True, slots=True)
class Retention:
    """For how many days are kept: records, digests of batches and seconds of workers; minutes; longer cells."""

    usage: int
    minutes: int
    rollups: int

    def first_usage_day(self, today: date) -> date:
        return today - timedelta(days=self.usage - 1)

    def first_minute_day(self, today: date) -> date:
        return today - timedelta(days=self.minutes - 1)


class Partitions:
    """Those of one database. `ensure` is to be called by who writes, in the same transaction."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self._known: set[str] = set()

    async def ensure(self, connection: Connection, days: Iterable[date]) -> None:
        """Makes what `days` need and is not there."""
        wanted = {name: part for day in days for part in _parts(day) if (name := part[0]) not in self._known}
        if not wanted:
            return
        rows = await connection.fetch("SELECT n FROM unnest($1::text[]) n WHERE to_regclass(n) IS NOT NULL", [*wanted])
        for name in wanted.keys() - {row[0] for row in rows}:
            _, table, first, end = wanted[name]
            options = " WITH (fillfactor = 70)" if table.startswith(("rollup", "margin")) else ""
            # Attached and not made as a partition, which would wait for reports and exports that run.
            await connection.execute(
                f"CREATE TABLE {name} (LIKE {table} INCLUDING CONSTRAINTS){options}; "
                f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{first}+00') TO ('{end}+00')"
            )

    def made(self, days: Iterable[date]) -> None:
        """`ensure` was committed."""
        self._known |= {part[0] for day in days for part in _parts(day)}

    def forget(self) -> None:
        """One that was believed to be there is not."""
        self._known.clear()

    async def prepare(self, database: Database, now: datetime) -> None:
        """Makes those of the days to come."""
        days = [now.date() + timedelta(days=ahead) for ahead in range(-1, DAYS_AHEAD + 1)]
        self.forget()
        async with database.writing() as connection:
            await self.ensure(connection, days)
        self.made(days)

    async def drop_old(self, database: Database, now: datetime) -> list[str]:
        """Drops those whose last day is over for good; their names."""
        today = now.date()
        first = {
            **dict.fromkeys(_AS_RECORDS, self.retention.first_usage_day(today)),
            **dict.fromkeys(_AS_MINUTES, self.retention.first_minute_day(today)),
            **dict.fromkeys((*_OF_MONTHS, *_OF_WEEKS), today - timedelta(days=self.retention.rollups - 1)),
        }
        dropped = []
        async with database.changing() as connection:
            found = await connection.fetch(
                "SELECT c.relname, p.relname AS parent FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
                "JOIN pg_class p ON p.oid = i.inhparent WHERE p.relname = ANY($1::text[])",
                list(first),
            )
            # A report that runs long is not waited for: the next round drops it.
            await connection.execute("SET LOCAL lock_timeout = '2s'")
            for name, parent in found:
                if _end_of(name) <= first[parent]:
                    await connection.execute(f"DROP TABLE {name}")
                    dropped.append(name)
        self._known -= set(dropped)
        return dropped


def usage_partition(day: date) -> str:
    return f"usage_{day:%Y%m%d}"


def _parts(day: date) -> list[tuple[str, str, date, date]]:
    """Name, table, first day and the day after the last one."""
    tomorrow = day + timedelta(days=1)
    months = {table: day.replace(day=1) for table in _OF_MONTHS}
    months |= {table: week_of(day).replace(day=1) for table in _OF_WEEKS}
    return [
        *((f"{table}_{day:%Y%m%d}", table, day, tomorrow) for table in (*_AS_RECORDS, *_AS_MINUTES)),
        *((f"{table}_{month:%Y%m}", table, month, next_month(month)) for table, month in months.items()),
    ]


def _end_of(name: str) -> date:
    """The day after a partition's last, by its name; of months the day after the last week that began in them."""
    digits = name.rpartition("_")[2]
    if len(digits) == 8:
        return datetime.strptime(digits, "%Y%m%d").date() + timedelta(days=1)
    return week_of(next_month(datetime.strptime(digits, "%Y%m").date()) - timedelta(days=1)) + timedelta(days=7)
