"""What the workers cost: used by requests, and idle. Both add up to the bill exactly.

A worker is paid for while it is up, for as many runs at once as its price says. Where more was computed than
workers were seen to be up for, the bill is what was computed: nobody computes for nothing. Requests count in the region
of their router, and may be computed in another: what one region computed beyond its workers, others were not idle for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.prices import ROUTER, PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.rollups import MEASURES
from services.ledger.storage.times import utc
from services.runtime.apportioned import apportioned

UP_TIME: Final = (
    "SELECT g.segment, p.region, p.worker_type, sum(p.up_us)::bigint FROM pool_hour p "
    "JOIN unnest($1::integer[], $2::timestamptz[], $3::timestamptz[]) AS g(segment, begins, ends) "
    "ON p.at >= g.begins AND p.at < g.ends GROUP BY 1, 2, 3"
)
_COMPUTE, _ROUTER_TIME = MEASURES.index("compute_us"), MEASURES.index("router_us")


@dataclass(slots=True)
class _Pool:
    """Of a worker type in a region: microseconds, and numerators of money."""

    paid_us: int = 0
    used_us: int = 0
    idle_us: int = 0
    requests: int = 0
    idle: int = 0


async def bill(
    connection: Connection, book: PriceBook, range_: TimeRange, *, allow_unpriced: bool
) -> ledger_pb2.BillResponse:
    """Of whole hours. Raises FailedPreconditionError where a price is missing and may not be."""
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rating = Rating(book, boundaries)
    used: dict[tuple[int, str, str], int] = {}
    for sums in await usage_query.fetch(connection, boundaries, ("region",), {}):
        (region,) = sums.group
        for worker_type, us in ((sums.worker_type, sums.measures[_COMPUTE]), (ROUTER, sums.measures[_ROUTER_TIME])):
            if us:
                key = (sums.segment, region, worker_type)
                used[key] = used.get(key, 0) + us
    up = await _up_us(connection, boundaries)
    pools: dict[tuple[str, str], _Pool] = {}
    warnings = []
    more: dict[str, int] = {}
    for segment, worker_type in sorted({(segment, kind) for segment, _, kind in used.keys() | up.keys()}):
        price = rating.price(worker_type, segment)
        slots = price.slots if price is not None else 1
        regions = sorted(
            {region for at, region, kind in used.keys() | up.keys() if (at, kind) == (segment, worker_type)}
        )
        paid = [up.get((segment, region, worker_type), 0) * slots for region in regions]
        busy = [used.get((segment, region, worker_type), 0) for region in regions]
        free = [max(had - us, 0) for had, us in zip(paid, busy, strict=True)]
        left = sum(paid) - sum(busy)
        more[worker_type] = more.get(worker_type, 0) - left
        for region, had, us, idle in zip(regions, paid, busy, apportioned(free, max(left, 0)), strict=True):
            pool = pools.setdefault((region, worker_type), _Pool())
            pool.paid_us += had
            pool.used_us += us
            pool.idle_us += idle
            pool.requests += rating.rated(worker_type, segment, us)
            pool.idle += rating.rated(worker_type, segment, idle)
    for worker_type, us in more.items():
        if us > 0:
            warnings.append(
                f"workers of type {worker_type!r} computed {us / 1e6:.1f} s more than they were seen to be up: their "
                "price has too few slots, or routers were down"
            )
    warnings += rating.warnings(allow_unpriced=allow_unpriced)
    return _response(pools, rating, book.currency, range_, warnings)


def _response(
    pools: Mapping[tuple[str, str], _Pool], rating: Rating, currency: str, range_: TimeRange, warnings: list[str]
) -> ledger_pb2.BillResponse:
    """Requests are rounded as in reports, the bill by itself; what is left is idle."""
    weights = [pool.requests for pool in pools.values()]
    idle_weights = [pool.idle for pool in pools.values()]
    requests_nano = rating.nano(sum(weights))
    idle_nano = rating.nano(sum(weights) + sum(idle_weights)) - requests_nano
    parts = zip(pools.items(), apportioned(weights, requests_nano), apportioned(idle_weights, idle_nano), strict=True)
    rows = [
        ledger_pb2.BillRow(
            worker_type=worker_type,
            region=region,
            paid_us=pool.paid_us,
            used_us=pool.used_us,
            idle_us=pool.idle_us,
            requests_nano=requests,
            idle_nano=idle,
            bill_nano=requests + idle,
        )
        for ((region, worker_type), pool), requests, idle in parts
    ]
    return ledger_pb2.BillResponse(
        rows=sorted(rows, key=lambda row: -row.bill_nano),
        total=ledger_pb2.BillRow(
            paid_us=sum(row.paid_us for row in rows),
            used_us=sum(row.used_us for row in rows),
            idle_us=sum(row.idle_us for row in rows),
            requests_nano=requests_nano,
            idle_nano=idle_nano,
            bill_nano=requests_nano + idle_nano,
        ),
        from_ms=range_.from_ms,
        until_ms=range_.until_ms,
        currency=currency,
        warnings=warnings,
    )


async def _up_us(connection: Connection, boundaries: list[int]) -> dict[tuple[int, str, str], int]:
    """By segment, region and worker type."""
    times = [utc(at_ms) for at_ms in boundaries]
    rows = await connection.fetch(UP_TIME, list(range(len(times) - 1)), times[:-1], times[1:])
    return {(row[0], row[1], row[2]): row[3] for row in rows}
