"""Hard budgets: what this router may spend of each before it asks the ledger again."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ringmesh.ledger.v1 import ledger_pb2

from services.runtime.errors import ResourceExhaustedError

_PERIODS = {ledger_pb2.PERIOD_DAY: "day", ledger_pb2.PERIOD_MONTH: "month"}
# Money is counted in 10**-9 of a nano-unit: nanoseconds times nano-units a second.
_FINE = 10**9


class Limit:
    """A budget: what this router has `spent` of it, up to where the ledger has recorded that (`delivered`) but for what
    it never will (`lost`, in the period), and up to where it may spend (`until`), all in units of 1 / _FINE nano-units.

    `next_nano`: what it may spend of the next period until the ledger answers. `is_ahead`: that period has begun here,
    and the ledger has not said so yet.
    """

    __slots__ = ("budget", "delivered", "is_ahead", "lost", "next_nano", "renews_at_ms", "spent", "until")

    def __init__(self, budget: ledger_pb2.Budget) -> None:
        self.budget = budget
        self.spent = self.delivered = self.lost = self.until = 0
        self.renews_at_ms = 0
        self.next_nano = 0
        self.is_ahead = False


class Budgets:
    """The leases of one router. Requests are charged when they end, so those under way may exceed a lease."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # By tenant and model; "" stands for all.
        self.limits: dict[tuple[str, str], list[Limit]] = {}
        self.tenants: set[str] = set()
        self._rates: dict[str, int] = {}
        self.refused = 0

    def check(self, tenant: str, model: str) -> None:
        """Raises ResourceExhaustedError if a budget of the tenant or the model is used up."""
        for limit in self._of(tenant, model):
            now = self._clock()
            if now * 1000 >= limit.renews_at_ms:
                _begin_next(limit, now)
            if limit.spent >= limit.until:
                self.refused += 1
                refusal = ResourceExhaustedError(_message(limit), kind="budget")
                refusal.retry_after = None
                raise refusal

    def charge(self, tenant: str, model: str, worker_type: str, compute_us: int, router_ns: int) -> None:
        """Charges a request that has ended."""
        rates = self._rates
        cost = compute_us * 1000 * rates.get(worker_type, 0) + router_ns * rates.get("router", 0)
        for limit in self._of(tenant, model):
            limit.spent += cost

    def _of(self, tenant: str, model: str) -> list[Limit]:
        limits = self.limits
        found = limits.get((tenant, model), [])
        if tenant:
            found = found + limits.get(("", model), [])
        return found + limits.get((tenant, ""), [])

    def request(self, router_id: str, epoch: int) -> tuple[ledger_pb2.LeaseRequest, list[tuple[Limit, int]]]:
        """Asks for leases. Also returns what was spent of each budget until now, which `renewed` needs."""
        request = ledger_pb2.LeaseRequest(router_id=router_id, start_epoch=epoch)
        spent = self.marks()
        for limit, at in spent:
            budget = limit.budget
            unsent = -((limit.delivered - limit.lost - at) // _FINE)  # rounded up
            request.uses.add(tenant=budget.tenant, model=budget.model, period=budget.period, unsent_nano=max(0, unsent))
        return request, spent

    def renewed(self, answer: ledger_pb2.LeaseResponse, spent: list[tuple[Limit, int]]) -> None:
        """Takes new leases in place of the old ones. What was spent after the request counts against them."""
        now_ms = self._clock() * 1000
        known = {_key(limit.budget): (limit, at) for limit, at in spent}
        limits: dict[tuple[str, str], list[Limit]] = {}
        for lease in answer.leases:
            limit, at = known.get(_key(lease.budget), (Limit(lease.budget), 0))
            # By the ledger's clock, the period that is over here may still last: its lease was spent in it. Where it
            # is not over here either, this router's clock was ahead and was set back.
            if lease.renews_at_ms >= limit.renews_at_ms or now_ms < lease.renews_at_ms:
                if lease.renews_at_ms > limit.renews_at_ms or limit.is_ahead:
                    limit.lost = 0
                limit.budget = lease.budget
                limit.renews_at_ms = lease.renews_at_ms
                limit.until = at + lease.amount_nano * _FINE
                # An older ledger does not say so, and answers within seconds: what it leases to one who asks first.
                limit.next_nano = lease.next_nano or lease.budget.hard_nano // 2
                limit.is_ahead = False
            limits.setdefault((lease.budget.tenant, lease.budget.model), []).append(limit)
        self._rates = dict(answer.nano_per_second)
        self.limits = limits
        self.tenants = {tenant for tenant, _ in limits}

    def marks(self) -> list[tuple[Limit, int]]:
        """What is spent of each budget now."""
        return [(limit, limit.spent) for limits in self.limits.values() for limit in limits]

    def delivered(self, marks: list[tuple[Limit, int]]) -> None:
        """The ledger has recorded all that was spent when `marks` were made."""
        for limit, spent in marks:
            limit.delivered = spent

    def lose(self, begin: list[tuple[Limit, int]], end: list[tuple[Limit, int]]) -> None:
        """The ledger will never have records of what was spent between these marks. It counts in the period."""
        before = {id(limit): spent for limit, spent in begin}
        for limit, spent in end:
            limit.lost += spent - before.get(id(limit), 0)


def _begin_next(limit: Limit, now: float) -> None:
    """The ledger may be down since before the period ended: of the next one, this router spends its part."""
    limit.until = limit.spent + limit.next_nano * _FINE
    limit.is_ahead = True
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if limit.budget.period == ledger_pb2.PERIOD_MONTH:
        renews = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    else:
        renews = today + timedelta(days=1)
    limit.renews_at_ms = int(renews.timestamp()) * 1000


def _key(budget: ledger_pb2.Budget) -> tuple[str, str, int]:
    return budget.tenant, budget.model, budget.period


def _amount(nano: int) -> str:
    """As whoever set the budget wrote it: in decimal, without zeros at the end."""
    whole, part = divmod(nano, 10**9)
    return f"{whole:,}.{part:09d}".rstrip("0").rstrip(".")


def _message(limit: Limit) -> str:
    budget = limit.budget
    owners = [f"{name} {value!r}" for name, value in (("tenant", budget.tenant), ("model", budget.model)) if value]
    renews = datetime.fromtimestamp(limit.renews_at_ms / 1000, UTC)
    return (
        f"the budget of {' and '.join(owners)}, {_amount(budget.hard_nano)} {budget.currency} a "
        f"{_PERIODS.get(budget.period, '')}, is used up; it renews at {renews:%Y-%m-%d %H:%M} UTC"
    )
