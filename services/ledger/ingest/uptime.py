"""Time that workers were up: several routers say so of the same second, and it counts once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.ledger.ingest.batch import WorkerMinute
from services.ledger.ingest.numbers import WorkerName
from services.ledger.storage.database import Connection
from services.ledger.storage.times import HOUR_MS, milliseconds, utc


async def add(connection: Connection, minutes: Iterable[WorkerMinute], numbers: Mapping[WorkerName, int]) -> None:
    """In the caller's transaction, which no other writes beside."""
    sent: dict[tuple[int, int], int] = {}
    pools: dict[int, tuple[str, str]] = {}
    for one in minutes:
        number = numbers[WorkerName(one.worker_id, one.worker_type, one.region)]
        pools[number] = (one.region, one.worker_type)
        sent[one.at_ms, number] = sent.get((one.at_ms, number), 0) | one.seconds
    if not sent:
        return
    keys = sorted(sent)
    times = [utc(at_ms) for at_ms, _ in keys]
    workers = [number for _, number in keys]
    rows = await connection.fetch(
        "SELECT w.at, w.worker, w.seconds FROM worker_minute w "
        "JOIN unnest($1::timestamptz[], $2::integer[]) AS n(at, worker) ON w.at = n.at AND w.worker = n.worker",
        times,
        workers,
    )
    known = {(milliseconds(row["at"]), row["worker"]): row["seconds"] for row in rows}
    added: dict[tuple[int, str, str], int] = {}
    for at_ms, number in keys:
        new = sent[at_ms, number] & ~known.get((at_ms, number), 0)
        pool = (at_ms // HOUR_MS * HOUR_MS, *pools[number])
        added[pool] = added.get(pool, 0) + new.bit_count() * 1_000_000
    await connection.execute(
        "INSERT INTO worker_minute AS w (at, worker, seconds) "
        "SELECT * FROM unnest($1::timestamptz[], $2::integer[], $3::bigint[]) "
        "ON CONFLICT (at, worker) DO UPDATE SET seconds = w.seconds | excluded.seconds",
        times,
        workers,
        [sent[key] for key in keys],
    )
    cells = sorted(added)
    await connection.execute(
        "INSERT INTO pool_hour AS p (at, region, worker_type, up_us) "
        "SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::bigint[]) "
        "ON CONFLICT (at, region, worker_type) DO UPDATE SET up_us = p.up_us + excluded.up_us",
        [utc(hour_ms) for hour_ms, _, _ in cells],
        [region for _, region, _ in cells],
        [worker_type for _, _, worker_type in cells],
        [added[cell] for cell in cells],
    )
