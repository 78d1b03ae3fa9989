"""The objectives page: service level objectives, how they were met, and the burn rate of the error budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.history import Curve, History, Labels, Line
from services.console.data.overview import DURATION, MOST_ROWS, REQUESTS, SERVER_FAULTS
from services.console.data.sources import Sources
from services.console.pages.chart import plot
from services.console.pages.live import Context

# The console's history is short, so it uses only the short windows of the alerts in deploy/prometheus.
WINDOWS = ((300.0, "5 min"), (1500.0, "25 min"))
LONG_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# The burn rate that uses up the 30-day budget in two days. The paging alert uses the same threshold.
FAST_BURN = 14.4


@dataclass(frozen=True, slots=True)
class Promise:
    """The objectives in the routers' settings. `latency`: the required share of answers within `seconds`."""

    availability: float
    latency: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Kept:
    """An objective within one window. `good` is NaN if there were no requests."""

    window: str
    good: float
    burn: float


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective, and how it was met in each window."""

    name: str
    promise: str
    kept: list[Kept]

    @property
    def verdict(self) -> str:
        """The result as text."""
        burns = [kept.burn for kept in self.kept]
        if all(map(math.isnan, burns)):
            return "nothing was asked for"
        if all(burn > FAST_BURN for burn in burns):
            return "the month's budget would be gone within two days"
        if burns[0] > 1:
            return "the budget goes faster than it may"
        return "kept"


async def contents(sources: Sources, _: Request) -> Context:
    """Returns the context of `objectives.html`."""
    history = sources.history
    promise = promised(history)
    models = objectives(history, promise, ("model",)) if promise else {}
    models.pop((), None)  # present if there were no requests
    return {
        "objectives": objectives(history, promise)[()] if promise else [],
        "asked": len(models),
        "burning": _burning(models),
        "most": MOST_ROWS,
        "fast_burn": FAST_BURN,
        "windows": [name for _, name in WINDOWS],
        "burns": _burns(history),
        "long_windows": LONG_WINDOWS,
        "charts": [
            plot("Requests that the service failed", [Line("share", _failed(history))], units.percent, least=0.01),
            plot(
                "Time to answer",
                overview.latency(history),
                units.seconds,
            ),
        ],
    }


def promised(history: History) -> Promise | None:
    """Returns the objectives, the strictest if routers differ; None before a router has reported any."""
    targets = history.last("ringmesh_slo_target_ratio", ("objective", "target"))
    seconds = history.last("ringmesh_slo_latency_seconds", ("target",))
    if not targets or not seconds:
        return None
    strictest = {
        name: max((value for (told, _), value in targets.items() if told == name), default=0.0)
        for name in ("availability", "latency")
    }
    return Promise(strictest["availability"], strictest["latency"], min(seconds.values()))


def objectives(history: History, promise: Promise, by: Sequence[str] = ()) -> dict[Labels, list[Objective]]:
    """Returns availability and latency of all requests, or by the values of the labels `by`."""
    answered = [_available(history, seconds, by) for seconds, _ in WINDOWS]
    quick = [_quick(history, seconds, promise.seconds, by) for seconds, _ in WINDOWS]
    groups = sorted({group for shares in answered for group in shares}) or [()]
    return {
        group: [
            Objective(
                "Availability",
                f"{units.percent(promise.availability)} of requests are answered, or refused for what the caller did",
                _kept(answered, group, promise.availability),
            ),
            Objective(
                "Latency",
                f"{units.percent(promise.latency)} of answers within {units.seconds(promise.seconds)}",
                _kept(quick, group, promise.latency),
            ),
        ]
        for group in groups
    }


def _burning(models: Mapping[Labels, list[Objective]]) -> list[tuple[str, Objective]]:
    """Returns the models' objectives that used part of their error budget, the highest burn rate first."""
    burns = {
        (model, objective.name): (max(kept.burn for kept in objective.kept if kept.burn > 0), model, objective)
        for (model,), each in models.items()
        for objective in each
        if any(kept.burn > 0 for kept in objective.kept)
    }
    return [(model, objective) for _, model, objective in sorted(burns.values(), key=lambda burn: -burn[0])]


def _burns(history: History) -> dict[str, dict[str, float]]:
    """Returns burn rates by objective and window, the highest of all routers; empty if no router reports any."""
    burns: dict[str, dict[str, float]] = {}
    for (objective, window, _), burn in history.last(
        "ringmesh_slo_burn_rate", ("objective", "window", "target")
    ).items():
        of = burns.setdefault(objective, {})
        of[window] = max(burn, of.get(window, 0.0))
    return burns


def _kept(shares: Sequence[Mapping[Labels, float]], group: Labels, objective: float) -> list[Kept]:
    """Returns the result in each window, from the shares of good requests."""
    goods = [(name, good.get(group, math.nan)) for (_, name), good in zip(WINDOWS, shares, strict=True)]
    return [Kept(name, good, (1 - good) / (1 - objective)) for name, good in goods]


def _available(history: History, seconds: float, by: Sequence[str]) -> dict[Labels, float]:
    """Returns the share of requests without a server error, for groups that have requests."""
    total: dict[Labels, float] = {}
    failed: dict[Labels, float] = {}
    for (*group, code), count in history.increase(REQUESTS, seconds, (*by, "code")).items():
        key = tuple(group)
        total[key] = total.get(key, 0.0) + count
        failed[key] = failed.get(key, 0.0) + count * (code in SERVER_FAULTS)
    return {key: 1 - failed[key] / asked for key, asked in total.items() if asked}


def _quick(history: History, seconds: float, limit: float, by: Sequence[str]) -> dict[Labels, float]:
    """Returns the share of answers within `limit`, rounded up to the next bucket bound, as on the router."""
    buckets: dict[Labels, dict[float, float]] = {}
    for (*group, le), count in history.increase(f"{DURATION}_bucket", seconds, (*by, "le")).items():
        buckets.setdefault(tuple(group), {})[float(le)] = count
    return {
        key: min(count for le, count in counts.items() if le >= limit) / counts[math.inf]
        for key, counts in buckets.items()
        if counts.get(math.inf)
    }


def _failed(history: History) -> Curve:
    all_ = overview.requests(history)
    faults = [history.rates(REQUESTS, *overview.span(history), code=code) for code in sorted(SERVER_FAULTS)]
    shares = [
        sum(curve.values[i] for curve in faults if not math.isnan(curve.values[i])) / asked if asked > 0 else math.nan
        for i, asked in enumerate(all_.values)
    ]
    return Curve(all_.times, shares)
