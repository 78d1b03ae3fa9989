"""Budgets and the leases on them, as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from services.ledger.storage.database import Connection


class BudgetKey(NamedTuple):
    """Whose costs are bounded; "" is all of them. `period` is "day" or "month"."""

    tenant: str
    model: str
    period: str


class Budget(NamedTuple):
    """In nano-units; 0 is none."""

    key: BudgetKey
    soft_nano: int
    hard_nano: int


async def all_budgets(connection: Connection) -> dict[int, Budget]:
    """By number."""
    rows = await connection.fetch("SELECT * FROM budget ORDER BY tenant, model, period")
    return {row["id"]: Budget(BudgetKey(*tuple(row)[1:4]), row["soft_nano"], row["hard_nano"]) for row in rows}


async def put(connection: Connection, budget: Budget) -> None:
    """In place of the one of the same key."""
    await connection.execute(
        "INSERT INTO budget (tenant, model, period, soft_nano, hard_nano) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (tenant, model, period) DO UPDATE "
        "SET soft_nano = excluded.soft_nano, hard_nano = excluded.hard_nano",
        *budget.key,
        budget.soft_nano,
        budget.hard_nano,
    )


async def delete(connection: Connection, key: BudgetKey) -> bool:
    """Whether there was one."""
    done: str = await connection.execute("DELETE FROM budget WHERE tenant = $1 AND model = $2 AND period = $3", *key)
    return done != "DELETE 0"


async def leased(connection: Connection, now: datetime, but: str = "") -> dict[int, int]:
    """What is held of each budget, spent without being recorded or not spent yet; by all holders but `but`."""
    rows = await connection.fetch(
        "SELECT budget, sum(amount_nano + unsent_nano)::bigint FROM budget_lease "
        "WHERE expires_at > $1 AND router_id <> $2 GROUP BY budget",
        now,
        but,
    )
    return {row[0]: row[1] for row in rows}


async def holders(connection: Connection, now: datetime) -> set[str]:
    """Of leases: lives of routers."""
    rows = await connection.fetch("SELECT DISTINCT router_id FROM budget_lease WHERE expires_at > $1", now)
    return {row[0] for row in rows}


def holder(router_id: str, start_epoch: int) -> str:
    """A life of a router, as the column `router_id` has it."""
    return f"{start_epoch} {router_id}"


async def begin_life(connection: Connection, router_id: str, start_epoch: int) -> None:
    """Where this life holds nothing yet, ends the leases of the lives before, once: one that still runs, since two
    routers have one id, asks again."""
    rows = await connection.fetch(
        "SELECT DISTINCT router_id FROM budget_lease "
        "WHERE router_id ~ '^[0-9]+ ' AND substr(router_id, strpos(router_id, ' ') + 1) = $1",
        router_id,
    )
    epochs = [int(row[0].partition(" ")[0]) for row in rows]
    if start_epoch not in epochs:
        before = [holder(router_id, epoch) for epoch in epochs if epoch < start_epoch]
        await connection.execute("DELETE FROM budget_lease WHERE router_id = ANY($1::text[])", before)


async def lease(
    connection: Connection, holder: str, leases: Sequence[tuple[int, int, int]], expires_at: datetime
) -> None:
    """Each as (budget, amount, unsent), in place of those that the holder has."""
    await connection.execute("DELETE FROM budget_lease WHERE router_id = $1", holder)
    await connection.executemany(
        "INSERT INTO budget_lease VALUES ($1, $2, $3, $4, $5)",
        [(budget, holder, amount, unsent, expires_at) for budget, amount, unsent in leases],
    )


async def drop_expired(connection: Connection, numbers: Iterable[int], now: datetime, latest: datetime) -> None:
    """Those of routers that are gone. No lease that is made now ends after `latest`: those that do are of a time before
    the clock was set back, and end then.
    """
    await connection.execute(
        "DELETE FROM budget_lease WHERE budget = ANY($1::integer[]) AND expires_at <= $2", list(numbers), now
    )
    await connection.execute("UPDATE budget_lease SET expires_at = $1 WHERE expires_at > $1", latest)
