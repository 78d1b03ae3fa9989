"""Cost: the compute that each model and tenant took, and what the cache made unnecessary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.requests import Request

from services.console.history import History
from services.console.live import Context
from services.console.overview import COMPUTE, HITS, REQUESTS, SPAN_SECONDS
from services.console.sources import Sources


@dataclass(frozen=True, slots=True)
class Cost:
    """Within the span: requests answered, seconds of compute spent on them, and saved."""

    name: str
    requests: float
    spent: float
    saved: float
    whole: float

    @property
    def share(self) -> float:
        """Of all compute spent."""
        return self.spent / self.whole if self.whole else 0.0

    @property
    def each(self) -> float:
        """Seconds of compute a request."""
        return self.spent / self.requests if self.requests else math.nan


async def contents(sources: Sources, _: Request) -> Context:
    """What `cost.html` shows."""
    history = sources.history
    models = _costs(history, "model")
    watched = history.watched(SPAN_SECONDS)
    spent, saved = (sum(getattr(cost, part) for cost in models) for part in ("spent", "saved"))
    return {
        "models": models,
        "tenants": _costs(history, "tenant"),
        "watched": watched,
        "spent": spent,
        "saved": saved,
        "busy": spent / watched,
        "without": (spent + saved) / watched,
    }


def _costs(history: History, label: str) -> list[Cost]:
    requests = history.increase(REQUESTS, SPAN_SECONDS, (label,), code="OK")
    compute = history.increase(COMPUTE, SPAN_SECONDS, (label, "outcome"))
    spent = {key: 0.0 for (key,) in requests}
    saved = dict(spent)
    for (key, outcome), seconds in compute.items():
        side = saved if outcome in HITS else spent
        side[key] = side.get(key, 0.0) + seconds
    whole = sum(spent.values())
    costs = [Cost(key, requests[key,], spent[key], saved[key], whole) for key in spent if requests.get((key,))]
    return sorted(costs, key=lambda cost: (-cost.spent, -cost.saved))
