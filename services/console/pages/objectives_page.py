"""The objectives page: service level objectives, how they were met, and the burn rate of the error budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.history import History, Labels, Values
from services.console.data.overview import DURATION, MOST_ROWS, REQUESTS, SERVER_FAULTS, subtotals
from services.console.data.sources import Sources
from services.console.pages import request_charts
from services.console.pages.chart import plot
from services.console.pages.live import Context
from services.console.pages.request_charts import ChartOptions

# Only the short windows of the alerts in deploy/prometheus: the console loses its history when it restarts.
WINDOWS = ((300.0, "5 min"), (1500.0, "25 min"))
LONG_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# The burn rate that uses up the 30-day budget in two days. The paging alert uses the same threshold.
FAST_BURN = 14.4


@dataclass(frozen=True, slots=True)
class Targets:
    """The objectives in the routers' settings. `latency`: the required share of answers within `seconds`."""

    availability: float
    latency: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective, and how it was met in each window. `good`: the shares of good requests; NaN without requests."""

    name: str
    promise: str
    target: float
    good: list[float]

    @property
    def burns(self) -> list[float]:
        return [(1 - good) / (1 - self.target) for good in self.good]

    @property
    def verdict(self) -> str:
        if all(map(math.isnan, self.burns)):
            return "no requests"
        if all(burn > FAST_BURN for burn in self.burns):
            return "the month's budget would be gone within two days"
        if self.burns[0] > 1:
            return "the budget is used up faster than planned"
        return "met"


async def contents(sources: Sources, request: Request) -> Context:
    history = sources.history
    options = ChartOptions(request)
    targets, edges = configured(history), options.edges(history)
    models = objectives(history, targets, ("model",)) if targets else {}
    models.pop((), None)  # present if there were no requests
    codes = history.rates(REQUESTS, edges, ("code",))
    faults = history.rates(REQUESTS, edges, ("code",), outcome="error")
    failed = overview.ratios(subtotals(faults, SERVER_FAULTS), subtotals(codes))
    return {
        "objectives": objectives(history, targets)[()] if targets else [],
        "asked": len(models),
        "burning": _burning(models),
        "most": MOST_ROWS,
        "fast_burn": FAST_BURN,
        "windows": [name for _, name in WINDOWS],
        "burns": _burns(history),
        "long_windows": LONG_WINDOWS,
        "switches": options.switches,
        "charts": [
            plot("Requests that the service failed", edges, {"share": failed.get(())}, units.percent, least=0.01),
            request_charts.latency(history, edges),
        ],
    }


def configured(history: History) -> Targets | None:
    """Returns the objectives, the strictest if routers differ; None before a router has reported any."""
    targets = history.last("ringmesh_slo_target_ratio", ("objective", "target"))
    seconds = history.last("ringmesh_slo_latency_seconds", ("target",))
    if not targets or not seconds:
        return None
    strictest: dict[str, float] = {}
    for (objective, _), target in targets.items():
        strictest[objective] = max(target, strictest.get(objective, 0.0))
    return Targets(strictest.get("availability", 0.0), strictest.get("latency", 0.0), min(seconds.values()))


def objectives(history: History, targets: Targets, by: Sequence[str] = ()) -> dict[Labels, list[Objective]]:
    """Returns availability and latency of all requests, or by the values of the labels `by`."""
    available = [_available(history, seconds, by) for seconds, _ in WINDOWS]
    quick = [_quick(history, seconds, targets.seconds, by) for seconds, _ in WINDOWS]
    return {
        group: [
            Objective(
                "Availability",
                f"{units.percent(targets.availability)} of requests are answered, or refused by the caller's fault",
                targets.availability,
                [shares[group] for shares in available],
            ),
            Objective(
                "Latency",
                f"{units.percent(targets.latency)} of answers within {units.seconds(targets.seconds)}",
                targets.latency,
                [shares[group] for shares in quick],
            ),
        ]
        for group in sorted({group for shares in available for group in shares}) or [()]
    }


def _burning(models: Mapping[Labels, list[Objective]]) -> list[tuple[str, Objective]]:
    """Returns the models' objectives that used part of their error budget, the highest burn rate first."""
    burning = [
        (model, objective)
        for (model,), each in models.items()
        for objective in each
        if any(burn > 0 for burn in objective.burns)
    ]
    return sorted(burning, key=lambda one: -max(burn for burn in one[1].burns if burn > 0))


def _burns(history: History) -> dict[str, dict[str, float]]:
    """Returns burn rates by objective and window, the highest of all routers; empty if no router reports any."""
    burns: dict[str, dict[str, float]] = {}
    reported = history.last("ringmesh_slo_burn_rate", ("objective", "window", "target"))
    for (objective, window, _), burn in reported.items():
        by_window = burns.setdefault(objective, {})
        by_window[window] = max(burn, by_window.get(window, 0.0))
    return burns


def _available(history: History, seconds: float, by: Sequence[str]) -> Values:
    """Returns the share of requests without a server error, for groups that have requests."""
    codes = history.increase(REQUESTS, seconds, (*by, "code"))
    failed = subtotals(history.increase(REQUESTS, seconds, (*by, "code"), outcome="error"), SERVER_FAULTS)
    return Values({key: 1 - failed.get(key, 0.0) / asked for key, asked in subtotals(codes).items() if asked})


def _quick(history: History, seconds: float, limit: float, by: Sequence[str]) -> Values:
    """Returns the share of answers within `limit`, rounded up to the next bucket bound, as on the router."""
    buckets: dict[Labels, dict[float, float]] = {}
    for (*group, le), count in history.increase(f"{DURATION}_bucket", seconds, (*by, "le")).items():
        buckets.setdefault(tuple(group), {})[float(le)] = count
    return Values(
        {
            key: min(count for le, count in counts.items() if le >= limit) / counts[math.inf]
            for key, counts in buckets.items()
            if counts.get(math.inf)
        }
    )
