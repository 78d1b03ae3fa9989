"""The cost page: the compute cost of each model and tenant, and the cost that the cache saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.requests import Request

from services.console.data import units
from services.console.data.history import History
from services.console.data.overview import COMPUTE, HITS, MOST_ROWS, REQUESTS, SPAN_SECONDS
from services.console.data.sources import Sources
from services.console.pages.live import Context

COST = "ringmesh_cost_total"
PRICE = "ringmesh_price"
_MONTH_SECONDS = 30 * 86400.0
_UNITS = {
    "cpu_second": "a second of CPU",
    "gpu_second": "a second of GPU",
    "memory_gb_hour": "an hour of 1 GB of memory",
}


@dataclass(frozen=True, slots=True)
class CostRow:
    """Requests answered within the time span, seconds of compute time spent and saved, and their prices."""

    name: str
    requests: float
    spent: float
    saved: float
    spent_price: float
    saved_price: float
    whole: float

    @property
    def share(self) -> float:
        """The share of all compute time spent."""
        return self.spent / self.whole if self.whole else 0.0

    @property
    def each(self) -> float:
        """Seconds of compute time per request."""
        return self.spent / self.requests if self.requests else math.nan

    @property
    def million(self) -> float:
        """The price of a million such requests."""
        return 1e6 * self.spent_price / self.requests if self.requests else math.nan


async def contents(sources: Sources, _: Request) -> Context:
    """Returns the context of `cost.html`."""
    history = sources.history
    models = _costs(history, "model")
    watched = history.watched(SPAN_SECONDS)
    spent, saved = (sum(getattr(cost, part) for cost in models) for part in ("spent", "saved"))
    prices = history.last(PRICE, ("target", "unit", "currency"))
    priced = history.increase(COST, SPAN_SECONDS, ("kind",))
    spent_price, saved_price, memory_price = (priced.get((kind,), 0.0) for kind in ("spent", "saved", "memory"))
    months = _MONTH_SECONDS / watched
    return {
        "models": models,
        "most": MOST_ROWS,
        "tenants": _costs(history, "tenant"),
        "watched": watched,
        "spent": spent,
        "saved": saved,
        "currency": next((currency for _, _, currency in prices), ""),
        "spent_price": spent_price,
        "saved_price": saved_price,
        "memory_price": memory_price,
        "months": months,
        "prices": sorted(
            {
                f"{units.money(price)} {currency} {_UNITS.get(unit, unit)}"
                for (_, unit, currency), price in prices.items()
            }
        ),
    }


def _costs(history: History, label: str) -> list[CostRow]:
    requests = history.increase(REQUESTS, SPAN_SECONDS, (label,), code="OK")
    compute = history.increase(COMPUTE, SPAN_SECONDS, (label, "outcome"))
    priced = history.increase(COST, SPAN_SECONDS, (label, "kind"))
    spent = {key: 0.0 for (key,) in requests}
    saved = dict(spent)
    for (key, outcome), seconds in compute.items():
        side = saved if outcome in HITS else spent
        side[key] = side.get(key, 0.0) + seconds
    whole = sum(spent.values())
    costs = [
        CostRow(
            key,
            requests[key,],
            spent[key],
            saved[key],
            priced.get((key, "spent"), 0.0),
            priced.get((key, "saved"), 0.0),
            whole,
        )
        for key in spent
        if requests.get((key,))
    ]
    return sorted(costs, key=lambda cost: (-cost.spent_price, -cost.spent, -cost.saved))
