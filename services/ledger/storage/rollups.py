"""Roll-ups: sums of the records by series and grain of time, changed in the transaction that writes them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from typing import Final

import numpy as np

from services.ledger.storage.database import Connection
from services.ledger.storage.partitions import Partitions
from services.ledger.storage.times import DAY_MS, HOUR_MS, MINUTE_MS, WEEK_MS, midnight_ms, utc, week_of
from services.ledger.storage.usage_rows import Integers

MEASURES: Final = (
    "requests",
    "hits",
    "errors",
    "compute_us",
    "saved_us",
    "error_us",
    "router_us",
    "total_us",
    "request_bytes",
    "response_bytes",
)
# Milliseconds, the finest first.
GRAINS: Final = {"minute": MINUTE_MS, "hour": HOUR_MS, "day": DAY_MS, "week": WEEK_MS}


def _upsert(table: str) -> str:
    arrays = ", ".join(f"${place}::bigint[]" for place in range(3, 3 + len(MEASURES)))
    names = ", ".join(MEASURES)
    sums = ", ".join(f"{name} = r.{name} + excluded.{name}" for name in MEASURES)
    return (
        f"INSERT INTO {table} AS r (at, series, {names}) "
        f"SELECT to_timestamp(at / 1000), series, {names} FROM unnest($1::bigint[], $2::integer[], {arrays}) "
        f"AS d(at, series, {names}) ON CONFLICT (at, series) DO UPDATE SET {sums}"
    )


class Deltas:
    """What records add to the cells of each grain. Arrays have an entry a record; times in ms since the Unix epoch.

    `tables` is "rollup" for numbers of series, "margin" for those of margins.
    """

    def __init__(self, tables: str, at_ms: Integers, series: Integers, measures: Mapping[str, Integers]) -> None:
        self._tables = tables
        self._at_ms = at_ms
        self._series = series
        self._measures = measures

    async def apply(self, connection: Connection, minutes_from_ms: int, weeks_until_ms: int) -> None:
        """In the caller's transaction, which no other writes beside. Minutes before `minutes_from_ms` are not kept,
        weeks from `weeks_until_ms` on not summed yet."""
        kept_of = {"minute": self._at_ms >= minutes_from_ms, "week": self._at_ms < weeks_until_ms}
        for grain in GRAINS:
            kept = kept_of.get(grain, np.ones(len(self._at_ms), bool))
            if kept.any():
                await connection.execute(_upsert(f"{self._tables}_{grain}"), *self._cells(GRAINS[grain], kept))

    def _cells(self, width_ms: int, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[list[int]]:
        """Columns of the cells, in the order of the primary key: locks and pages are taken in one direction."""
        at = self._at_ms[kept] // width_ms * width_ms
        series = self._series[kept]
        order = np.lexsort((series, at))
        at, series = at[order], series[order]
        starts = np.flatnonzero(np.concatenate(([True], (np.diff(at) != 0) | (np.diff(series) != 0))))
        sums = (np.add.reduceat(self._measures[name][kept][order], starts) for name in MEASURES)
        return [column.tolist() for column in (at[starts], series[starts], *sums)]


async def weeks_until(connection: Connection) -> datetime:
    """Weeks before have cells."""
    until: datetime = await connection.fetchval("SELECT until FROM weeks_summed")
    return until


async def sum_weeks(connection: Connection, partitions: Partitions, now_ms: int) -> datetime:
    """Sums the weeks that are over from their days, in the writer's transaction; returns the end of the last one."""
    since, until = await weeks_until(connection), utc(now_ms // WEEK_MS * WEEK_MS)
    if until <= since:
        return since
    weeks = (until - since).days // 7
    await partitions.ensure(connection, [since.date() + timedelta(days=7 * week) for week in range(weeks)])
    await _fill_weeks(connection, since, until)
    await connection.execute("UPDATE weeks_summed SET until = $1", until)
    return until


async def sum_week_again(connection: Connection, day: date) -> None:
    """Sums the week of a day whose cells have changed, if it is summed already; in the writer's transaction."""
    week = utc(midnight_ms(week_of(day)))
    if week < await weeks_until(connection):
        for tables in ("rollup", "margin"):
            await connection.execute(f"DELETE FROM {tables}_week WHERE at = $1", week)
        await _fill_weeks(connection, week, week + timedelta(days=7))


async def _fill_weeks(connection: Connection, since: datetime, until: datetime) -> None:
    """From the cells of days; there are none of those weeks yet."""
    for tables in ("rollup", "margin"):
        await connection.execute(
            f"INSERT INTO {tables}_week (at, series, {', '.join(MEASURES)}) SELECT date_bin('1 week', at, 'epoch'), "
            f"series, {', '.join(f'bigint_sum({name})' for name in MEASURES)} FROM {tables}_day "
            "WHERE at >= $1 AND at < $2 GROUP BY 1, 2 ORDER BY 1, 2",
            since,
            until,
        )


async def touch(connection: Connection, days: Iterable[date]) -> None:
    """Says that what reports of `days` rest on changed.

    By a version that no other database has, nor this one before it was set back to a backup: they may share a cache.
    """
    await connection.execute(
        "INSERT INTO day_version (day, version) SELECT day, $2::bigint FROM unnest($1::date[]) AS d(day) "
        "ON CONFLICT (day) DO UPDATE SET version = excluded.version",
        sorted(days),
        secrets.randbits(62),
    )
