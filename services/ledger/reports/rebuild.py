"""The roll-ups of a day, computed again from its records."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from services.ledger.storage import kinds, rollups
from services.ledger.storage.cubes import CUBES
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.partitions import Partitions
from services.ledger.storage.rollups import MEASURES
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError

# $3 and $4 are the fields of `kinds.KindNumbers`.
_OF_RECORDS = {
    "hits": "CASE WHEN u.kind = ANY($3) THEN u.requests ELSE 0 END",
    "errors": "CASE WHEN u.kind = ANY($4) THEN u.requests ELSE 0 END",
    "error_us": "CASE WHEN u.kind = ANY($4) THEN u.compute_us ELSE 0 END",
}
_NAMES = ", ".join(MEASURES)
_LONGEST_SECONDS = 3600.0
_FROM_RECORDS = ", ".join(f"bigint_sum({_OF_RECORDS.get(name, f'u.{name}')})" for name in MEASURES)
_FROM_CELLS = ", ".join(f"bigint_sum(u.{name})" for name in MEASURES)


async def rebuild(database: Database, partitions: Partitions, day: date, now: datetime) -> tuple[int, int]:
    """Records and requests of the day. Writing waits meanwhile.

    Raises InvalidArgumentError where the day is not kept, FailedPreconditionError where fewer requests are recorded
    than the roll-ups count: the rest would be lost.
    """
    if not partitions.retention.first_usage_day(now.date()) <= day <= now.date():
        raise InvalidArgumentError(f"records of {day} are not kept", field="day")
    begin = datetime.combine(day, datetime.min.time(), UTC)
    bounds = (begin, begin + timedelta(days=1))
    keeps_minutes = day >= partitions.retention.first_minute_day(now.date())
    # One that somebody dropped by hand is believed to be there until a batch needs it.
    partitions.forget()
    async with database.writing(_LONGEST_SECONDS) as connection:
        await partitions.ensure(connection, [day])
        records, requests = await connection.fetchrow(
            "SELECT count(*), coalesce(sum(requests), 0)::bigint FROM usage WHERE at >= $1 AND at < $2", *bounds
        )
        counted = await connection.fetchval(
            "SELECT coalesce(sum(requests), 0)::bigint FROM rollup_day WHERE at >= $1 AND at < $2", *bounds
        )
        if requests < counted:
            raise FailedPreconditionError(
                f"the records of {day} hold {requests} requests and its roll-ups {counted}: records were dropped, and "
                "what they counted would be lost",
                field="day",
            )
        # Of cells that were just inserted PostgreSQL has no statistics, and would read all margins for each of them.
        await connection.execute("SET LOCAL enable_nestloop = off; SET LOCAL jit = off")
        # Each grain from the one before, the finest from the records.
        source, sums = "usage u", _FROM_RECORDS
        arguments: tuple[object, ...] = (*bounds, *await kinds.numbers(connection))
        for grain in ("minute", "hour", "day"):
            for tables in ("rollup", "margin"):
                await connection.execute(f"DELETE FROM {tables}_{grain} WHERE at >= $1 AND at < $2", *bounds)
            if grain != "minute" or keeps_minutes:
                await _fill(connection, grain, source, sums, arguments)
                source, sums, arguments = f"rollup_{grain} u", _FROM_CELLS, bounds
        await rollups.sum_week_again(connection, day)
        await rollups.touch(connection, [day])
    partitions.made([day])
    return records, requests


async def _fill(connection: Connection, grain: str, source: str, sums: str, arguments: tuple[object, ...]) -> None:
    """The cells of a day, whose bounds are the first two of `arguments`. Margins are there since its records were
    written."""
    await connection.execute(
        f"INSERT INTO rollup_{grain} (at, series, {_NAMES}) "
        f"SELECT date_trunc('{grain}', u.at, 'UTC'), u.series, {sums} FROM {source} "
        "WHERE u.at >= $1 AND u.at < $2 GROUP BY 1, 2 ORDER BY 1, 2",
        *arguments,
    )
    for cube, names in CUBES.items():
        same = " AND ".join(f"m.{name} = s.{name}" for name in (*names, "worker_type"))
        await connection.execute(
            f"INSERT INTO margin_{grain} (at, series, {_NAMES}) SELECT u.at, m.id, {_FROM_CELLS} "
            f"FROM rollup_{grain} u JOIN series s ON s.id = u.series JOIN margin m ON m.cube = '{cube}' AND {same} "
            "WHERE u.at >= $1 AND u.at < $2 GROUP BY 1, 2 ORDER BY 1, 2",
            *arguments[:2],
        )
