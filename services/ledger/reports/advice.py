"""What would have cost less: workers, batches and caches, from demand that is replayed."""

from __future__ import annotations

import asyncio

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import demand
from services.ledger.reports.cache_advice import CacheAdvice
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.worker_advice import WorkerAdvice
from services.ledger.storage.database import Connection
from services.ledger.storage.times import HOUR_MS
from services.runtime.errors import InvalidArgumentError

_MOST_HOURS = 48


async def advise(
    connection: Connection,
    book: PriceBook,
    range_: TimeRange,
    worker_type: str,
    latency_us: int,
    memory_nano: int,
) -> ledger_pb2.AdviseResponse:
    """Of whole minutes. Raises InvalidArgumentError, and FailedPreconditionError where a price is missing."""
    if range_.until_ms - range_.from_ms > _MOST_HOURS * HOUR_MS:
        raise InvalidArgumentError(f"advice replays at most {_MOST_HOURS} hours", field="from_ms")
    hours = await demand.fetch(connection, range_, worker_type)
    rating = Rating(book, [*(hour.span.from_ms for hour in hours), range_.until_ms])
    workers = WorkerAdvice(hours, rating, latency_us)
    cache = CacheAdvice(range_, rating, memory_nano)
    await cache.fetch(connection, worker_type)
    lines, recommendations = await asyncio.to_thread(workers.advise)
    sizes, more = await asyncio.to_thread(cache.advise)
    rating.warnings(allow_unpriced=False)
    return ledger_pb2.AdviseResponse(
        recommendations=sorted([*recommendations, *more], key=lambda one: -one.saved_nano),
        hours=lines,
        cache_sizes=sizes,
        from_ms=range_.from_ms,
        until_ms=range_.until_ms,
        latency_us=latency_us,
        currency=book.currency,
        warnings=workers.warnings,
    )
