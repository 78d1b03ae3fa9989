"""How many workers each hour would have needed, from the requests that it computed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.money import rounded
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.replay import Work, needed, percentile_99, waits
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.price_table import HOUR_MS
from services.runtime.errors import InvalidArgumentError

_MOST_HOURS = 48
_HOUR_US = HOUR_MS * 1000
_WORK = (
    "SELECT (extract(epoch FROM u.at) * 1000000)::bigint - u.total_us / greatest(u.requests, 1), u.compute_us, "
    "u.queue_us / greatest(u.requests, 1), greatest(u.requests, 1) FROM usage u "
    "JOIN series s ON s.id = u.series "
    "WHERE u.at >= $1 AND u.at < $2 AND u.compute_us > 0 AND s.worker_type = $3 ORDER BY 1"
)
_UP = "SELECT at, sum(up_us)::bigint FROM pool_hour WHERE at >= $1 AND at < $2 AND worker_type = $3 GROUP BY at"


async def advise_workers(
    connection: Connection, book: PriceBook, currency: str, range_: TimeRange, worker_type: str, wait_us: int
) -> ledger_pb2.AdviseWorkersResponse:
    """Of whole hours. Raises InvalidArgumentError, and FailedPreconditionError where a price is missing."""
    if range_.until_ms - range_.from_ms > _MOST_HOURS * HOUR_MS:
        raise InvalidArgumentError(f"advice replays at most {_MOST_HOURS} hours", field="from_ms")
    hours = list(range(range_.from_ms, range_.until_ms, HOUR_MS))
    rating = Rating(book, [*hours, range_.until_ms])
    up = {
        int(row[0].timestamp()) * 1000: row[1]
        for row in await connection.fetch(_UP, _time(range_.from_ms), _time(range_.until_ms), worker_type)
    }
    per_hour, money = [], []
    for place, begin in enumerate(hours):
        rows = await connection.fetch(_WORK, _time(begin), _time(begin + HOUR_MS), worker_type)
        price = rating.price(worker_type, place)
        slots = price.slots if price is not None else 1
        # In slot time, as prices go by.
        up_us = up.get(begin, 0)
        hour = await asyncio.to_thread(_advised, rows, up_us, slots, wait_us)
        hour.begins_ms = begin
        paid, advised = (
            rating.rated(worker_type, place, us * slots) for us in (up_us, hour.advised_workers * _HOUR_US)
        )
        hour.cost_nano, hour.advised_cost_nano = (rounded(one, book.denominator) for one in (paid, advised))
        money.append((paid, advised))
        per_hour.append(hour)
    rating.warnings(allow_unpriced=False)
    measured = [hour for hour in per_hour if hour.requests and round(hour.workers)]
    warnings = []
    if len(measured) < sum(hour.requests > 0 for hour in per_hour):
        warnings.append("in some hours no worker was seen to be up: their replay cannot be checked")
    return ledger_pb2.AdviseWorkersResponse(
        hours=per_hour,
        wait_us=wait_us,
        currency=currency,
        cost_nano=rounded(sum(paid for paid, _ in money), book.denominator),
        advised_cost_nano=rounded(sum(advised for _, advised in money), book.denominator),
        error_us=round(median(abs(hour.replayed_wait_us - hour.measured_wait_us) for hour in measured))
        if measured
        else 0,
        warnings=warnings,
    )


def _advised(rows: Sequence[Sequence[int]], up_us: int, slots: int, wait_us: int) -> ledger_pb2.AdvisedHour:
    work = [Work(row[0], row[1]) for row in rows]
    workers = up_us / _HOUR_US
    replayed = waits(work, round(workers) * slots) if round(workers) else []
    advised, advised_wait = needed(work, wait_us, slots, _HOUR_US)
    return ledger_pb2.AdvisedHour(
        requests=sum(row[3] for row in rows),
        compute_us=sum(service for _, service in work),
        workers=workers,
        measured_wait_us=percentile_99([row[2] for row in rows]),
        replayed_wait_us=percentile_99(replayed),
        advised_workers=advised,
        advised_wait_us=advised_wait,
    )


def _time(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)
