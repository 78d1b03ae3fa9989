"""Budgets: what is spent of them, and what routers may spend before they ask again.

A router holds at most half of what is left, so that others find some; near the end, all of it. What it holds counts as
spent until it says otherwise or has been silent for _LEASE_SECONDS. So all that can be spent beyond a budget are leases
of routers that were silent for longer, and what requests under way cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.money import CURRENCIES, rounded
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.storage import budget_table
from services.ledger.storage.budget_table import Budget, BudgetKey
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.times import milliseconds, next_month
from services.runtime.errors import InvalidArgumentError, NotFoundError

_RENEW_MS = 2_000
_LEASE_SECONDS = 30.0
# Below a thousandth, what is left is not divided any more.
_CRUMB = 1000
_MOST_NANO = 10**18
PERIODS = {"day": ledger_pb2.PERIOD_DAY, "month": ledger_pb2.PERIOD_MONTH}


class BudgetList:
    """Of one ledger; `clock` as time.time."""

    def __init__(self, database: Database, prices: PriceList, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._prices = prices
        self._clock = clock

    async def set(self, budget: Budget, currency: str) -> None:
        """Raises InvalidArgumentError."""
        if currency not in CURRENCIES or currency != self._prices.currency:
            raise InvalidArgumentError(
                f"the budget is in {currency!r}, and this ledger counts in {self._prices.currency}",
                field="budget.currency",
            )
        _check(budget)
        async with self._database.changing() as connection:
            await budget_table.put(connection, budget)

    async def delete(self, key: BudgetKey) -> None:
        """Raises NotFoundError."""
        async with self._database.changing() as connection:
            if not await budget_table.delete(connection, key):
                raise NotFoundError(f"there is no budget of {named(key)}", field="tenant")

    async def states(self) -> ledger_pb2.ListBudgetsResponse:
        """All of them, and what is not in what they spent because it has no price."""
        now = self._now()
        async with self._database.reading() as connection:
            budgets = await budget_table.all_budgets(connection)
            spent, warnings = await self._spent(connection, budgets.values(), now)
            leased = await budget_table.leased(connection, now)
        states = []
        for number, budget in budgets.items():
            nano = spent[budget.key]
            begins, renews_at = bounds(budget.key.period, now)
            states.append(
                ledger_pb2.BudgetState(
                    budget=self._message(budget),
                    spent_nano=nano,
                    leased_nano=leased.get(number, 0),
                    begins_ms=milliseconds(begins),
                    renews_at_ms=milliseconds(renews_at),
                    soft_reached=0 < budget.soft_nano <= nano,
                    hard_reached=0 < budget.hard_nano <= nano,
                )
            )
        return ledger_pb2.ListBudgetsResponse(budgets=states, warnings=warnings)

    async def lease(
        self, router_id: str, start_epoch: int, unsent: Mapping[BudgetKey, int]
    ) -> ledger_pb2.LeaseResponse:
        """A router's share of each hard budget, and what a second of each worker type costs now.

        What a batch adds meanwhile is in what its router said to be unsent, or counts twice until that asks again.
        """
        now = self._now()
        expires_at = now + timedelta(seconds=_LEASE_SECONDS)
        holder = budget_table.holder(router_id, start_epoch)
        async with self._database.leasing() as connection:
            budgets = {
                number: one for number, one in (await budget_table.all_budgets(connection)).items() if one.hard_nano
            }
            spent, _ = await self._spent(connection, budgets.values(), now)
            await budget_table.drop_expired(connection, budgets, now, expires_at)
            await budget_table.begin_life(connection, router_id, start_epoch)
            others = await budget_table.leased(connection, now, but=holder)
            routers = len(await budget_table.holders(connection, now) | {holder})
            leases, written = [], []
            for number, budget in budgets.items():
                own = unsent.get(budget.key, 0)
                left = budget.hard_nano - spent[budget.key] - others.get(number, 0) - own
                amount = share(left, budget.hard_nano)
                leases.append(
                    ledger_pb2.BudgetLease(
                        budget=self._message(budget),
                        amount_nano=amount,
                        renews_at_ms=milliseconds(bounds(budget.key.period, now)[1]),
                        next_nano=budget.hard_nano // routers,
                    )
                )
                written.append((number, amount, own))
            await budget_table.lease(connection, holder, written, expires_at)
            book = await self._prices.book(connection)
        rates = _rates(book, milliseconds(now))
        return ledger_pb2.LeaseResponse(leases=leases, nano_per_second=rates, renew_ms=_RENEW_MS)

    def _message(self, budget: Budget) -> ledger_pb2.Budget:
        return ledger_pb2.Budget(
            tenant=budget.key.tenant,
            model=budget.key.model,
            period=PERIODS[budget.key.period],
            soft_nano=budget.soft_nano,
            hard_nano=budget.hard_nano,
            currency=self._prices.currency,
        )

    async def _spent(
        self, connection: Connection, budgets: Iterable[Budget], now: datetime
    ) -> tuple[dict[BudgetKey, int], list[str]]:
        """Nano-units of the period, by budget; what routers whose clocks are ahead recorded, too."""
        keys = [budget.key for budget in budgets]
        book = await self._prices.book(connection)
        spent = dict.fromkeys(keys, 0)
        warnings: list[str] = []
        for period in PERIODS:
            for names in (("tenant",), ("model",), ("tenant", "model")):
                wanted = [key for key in keys if key.period == period and _names(key) == names]
                if not wanted:
                    continue
                boundaries = book.boundaries(*map(milliseconds, bounds(period, now)))
                rating = Rating(book, boundaries)
                filters = {name: sorted({getattr(key, name) for key in wanted}) for name in names}
                costs: dict[tuple[str, ...], int] = {}
                for sums in await usage_query.fetch(connection, boundaries, names, filters):
                    costs[sums.group] = costs.get(sums.group, 0) + rating.amounts(sums).cost
                warnings += rating.warnings(allow_unpriced=True)
                for key in wanted:
                    group = tuple(getattr(key, name) for name in names)
                    spent[key] = rating.nano(costs.get(group, 0))
        return spent, warnings

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def share(left: int, hard: int) -> int:
    """Of what is left of a budget, for one router."""
    if left <= 0:
        return 0
    return left if left * _CRUMB <= hard else left // 2


def bounds(period: str, now: datetime) -> tuple[datetime, datetime]:
    """When the period that holds began, and when the next does."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day, day + timedelta(days=1)
    return day.replace(day=1), next_month(day)


def named(key: BudgetKey) -> str:
    whose = [f"tenant {key.tenant!r}"] if key.tenant else []
    whose += [f"model {key.model!r}"] if key.model else []
    return f"{' and '.join(whose)} for a {key.period}"


def _names(key: BudgetKey) -> tuple[str, ...]:
    return tuple(name for name in ("tenant", "model") if getattr(key, name))


def _rates(book: PriceBook, now_ms: int) -> dict[str, int]:
    held = [price for price in book.prices if price.from_ms <= now_ms < price.until_ms]
    return {price.worker_type: rounded(book.rate(price) * 1_000_000, book.denominator) for price in held}


def _check(budget: Budget) -> None:
    if not _names(budget.key):
        raise InvalidArgumentError("a budget is of a tenant, of a model, or of both", field="budget.tenant")
    for name in ("tenant", "model"):
        value = getattr(budget.key, name)
        if len(value) > 256 or not (value.isprintable() or not value):
            raise InvalidArgumentError(f"{name} has up to 256 printable characters", field=f"budget.{name}")
    for name in ("soft_nano", "hard_nano"):
        if not 0 <= getattr(budget, name) <= _MOST_NANO:
            raise InvalidArgumentError(
                f"{name} is {getattr(budget, name)}; it is 0 to {_MOST_NANO}", field=f"budget.{name}"
            )
    if not (budget.soft_nano or budget.hard_nano):
        raise InvalidArgumentError("a budget has a soft bound, a hard one, or both", field="budget.hard_nano")
    if budget.hard_nano and budget.soft_nano > budget.hard_nano:
        raise InvalidArgumentError("the soft bound is at most the hard one", field="budget.soft_nano")
