"""The roll-ups of a day, computed again from its records."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from services.ledger.storage import rollups
from services.ledger.storage.cubes import CUBES
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.partitions import Partitions
from services.ledger.storage.rollups import MEASURES
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError

_IS_HIT = "(k.status = 'OK' AND (k.outcome LIKE 'hit-%' OR k.outcome = 'joined'))"
_SUMS = {
    "hits": f"u.requests * {_IS_HIT}::int",
    "errors": "u.requests * (k.status <> 'OK')::int",
    "error_us": "u.compute_us * (k.status <> 'OK')::int",
}
_NAMES = ", ".join(MEASURES)
_FROM_RECORDS = ", ".join(f"sum({_SUMS.get(name, f'u.{name}')})::bigint AS {name}" for name in MEASURES)
_FROM_CELLS = ", ".join(f"sum({name})::bigint" for name in MEASURES)


async def rebuild(database: Database, partitions: Partitions, day: date, now: datetime) -> tuple[int, int]:
    """Records and requests of the day. Writing waits meanwhile.

    Raises InvalidArgumentError where the day is not kept, FailedPreconditionError where fewer requests are recorded
    than the roll-ups count: the rest would be lost.
    """
    if not partitions.retention.first_usage_day(now.date()) <= day <= now.date():
        raise InvalidArgumentError(f"records of {day} are not kept", field="day")
    begin = datetime.combine(day, datetime.min.time(), UTC)
    bounds = (begin, begin + timedelta(days=1))
    finest = "minute" if day >= partitions.retention.first_minute_day(now.date()) else "hour"
    async with database.writing() as connection:
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
        await connection.execute(
            "CREATE TEMPORARY TABLE cells ON COMMIT DROP AS "
            f"SELECT date_trunc('{finest}', u.at, 'UTC') AS at, u.series, {_FROM_RECORDS} "
            "FROM usage u JOIN kind k ON k.id = u.kind WHERE u.at >= $1 AND u.at < $2 GROUP BY 1, 2",
            *bounds,
        )
        for grain in rollups.GRAINS:
            for tables in ("rollup", "margin"):
                await connection.execute(f"DELETE FROM {tables}_{grain} WHERE at >= $1 AND at < $2", *bounds)
            if grain != "minute" or finest == "minute":
                await _fill(connection, grain)
        await rollups.touch(connection, [day])
    partitions.made([day])
    return records, requests


async def _fill(connection: Connection, grain: str) -> None:
    """From the finest cells that are kept, by series. Margins are there since the day's records were written."""
    at = f"date_trunc('{grain}', c.at, 'UTC') AS at"
    await connection.execute(
        f"INSERT INTO rollup_{grain} (at, series, {_NAMES}) "
        f"SELECT {at}, c.series, {_FROM_CELLS} FROM cells c GROUP BY 1, 2 ORDER BY 1, 2"
    )
    for cube, names in CUBES.items():
        same = " AND ".join(f"m.{name} = s.{name}" for name in (*names, "worker_type"))
        await connection.execute(
            f"INSERT INTO margin_{grain} (at, series, {_NAMES}) SELECT {at}, m.id, {_FROM_CELLS} "
            f"FROM cells c JOIN series s ON s.id = c.series JOIN margin m ON m.cube = '{cube}' AND {same} "
            "GROUP BY 1, 2 ORDER BY 1, 2"
        )
