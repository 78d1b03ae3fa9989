"""Prices by worker type and period, as they are stored."""

from __future__ import annotations

from typing import NamedTuple

from services.ledger.storage.database import Connection
from services.ledger.storage.times import milliseconds, utc

# Beyond every report: 9999-01-01, for prices without an end.
NO_END_MS = 253_370_764_800_000


class Price(NamedTuple):
    """Of a worker of a type from `from_ms` until before `until_ms`, in nano-units of the ledger's currency."""

    worker_type: str
    from_ms: int
    until_ms: int
    hourly_nano: int
    device: str = ""
    slots: int = 1
    power_milliwatts: int = 0
    energy_nano_per_kwh: int = 0


async def all_prices(connection: Connection) -> list[Price]:
    """In the order of types and time."""
    rows = await connection.fetch("SELECT * FROM price ORDER BY worker_type, from_at")
    return [Price(row[0], milliseconds(row[1]), milliseconds(row[2]), *row[3:]) for row in map(tuple, rows)]


async def replace(connection: Connection, worker_type: str, prices: list[Price]) -> None:
    await connection.execute("DELETE FROM price WHERE worker_type = $1", worker_type)
    await connection.executemany(
        "INSERT INTO price (worker_type, from_at, until_at, hourly_nano, device, slots, power_milliwatts, "
        "energy_nano_per_kwh) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        [(price.worker_type, utc(price.from_ms), utc(price.until_ms), *price[3:]) for price in prices],
    )


async def lock(connection: Connection) -> None:
    """Until the transaction ends, prices change nowhere else."""
    await connection.execute("LOCK TABLE price IN SHARE ROW EXCLUSIVE MODE")


async def currency(connection: Connection, wanted: str) -> str:
    """What this ledger counts in: `wanted` if it is new."""
    await connection.execute("INSERT INTO ledger (currency) VALUES ($1) ON CONFLICT DO NOTHING", wanted)
    found: str = await connection.fetchval("SELECT currency FROM ledger")
    return found
