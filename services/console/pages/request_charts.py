"""The charts of requests on several pages, and the switches for their time range and breakdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np
from markupsafe import Markup
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.history import Floats, History, Labels
from services.console.data.overview import ATTEMPT, DURATION, REQUESTS, STAGE, subtotals
from services.console.pages.chart import plot

# Time span and step in seconds.
_RANGES = {"15 min": (900.0, 10.0), "2 h": (7200.0, 60.0), "24 h": (86_400.0, 600.0)}
# While the console is young, so that the little data there is fills the chart.
_YOUNG = (180.0, 5.0)
_MAX_LINES = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """One position of a switch: a link that keeps all other parameters of the page."""

    label: str
    link: str
    is_chosen: bool


class ChartOptions:
    """The time range and the breakdown that a request asks for. `breakdowns` are those that the page offers."""

    def __init__(self, request: Request, *breakdowns: str) -> None:
        self._params = dict(request.query_params)
        chosen = self._params.get("by", "")
        self.by = chosen if chosen in breakdowns else ""
        self._range = self._params.get("range", "")
        self.switches = [("Time range", self._choices("range", {name: name for name in _RANGES}))]
        if breakdowns:
            options = {"": "all", **{name: f"by {name}" for name in breakdowns}}
            self.switches.append(("Breakdown", self._choices("by", options)))

    def edges(self, history: History) -> Floats:
        is_young = history.watched(_YOUNG[0]) < _YOUNG[0]
        return history.edges(*_RANGES.get(self._range, _YOUNG if is_young else _RANGES["15 min"]))

    def _choices(self, name: str, options: Mapping[str, str]) -> list[Choice]:
        chosen = self._params.get(name, "")
        if chosen not in options:
            chosen = next(iter(options))
        return [
            Choice(label, f"?{urlencode({**self._params, name: value})}", value == chosen)
            for value, label in options.items()
        ]


def charts(history: History, options: ChartOptions, **where: str) -> list[Markup]:
    """Returns four charts of all requests with the labels `where`, broken down by what `options` say."""
    edges = options.edges(history)
    if options.by == "worker":
        return _by_worker(history, edges, **where)
    by = (options.by,) if options.by else ()
    codes = history.rates(REQUESTS, edges, (*by, "code"), **where)
    requests = subtotals(codes)
    hit_ratio, saved = overview.hit_ratio(history, edges, by, **where), overview.saved(history, edges, by, **where)
    if by:
        p99 = {key: curves[0] for key, curves in history.quantiles((0.99,), DURATION, edges, by, **where).items()}
        shown = _largest(requests)
        return [
            plot("Requests/s", edges, _lines(requests, shown), units.number),
            plot("Response time, p99", edges, _lines(p99, shown), units.seconds),
            plot("From the cache", edges, _lines(hit_ratio, shown), units.percent, least=1.0),
            plot("Compute saved per second", edges, _lines(saved, shown), units.seconds),
        ]
    failed = subtotals({labels: rate for labels, rate in codes.items() if labels != ("OK",)})
    return [
        plot("Requests/s", edges, {"all": requests.get(()), "failed": failed.get(())}, units.number),
        latency(history, edges, **where),
        plot("From the cache", edges, {"hit ratio": hit_ratio.get(())}, units.percent, least=1.0),
        plot("Compute saved per second", edges, {"saved": saved.get(())}, units.seconds),
    ]


def latency(history: History, edges: Floats, **where: str) -> Markup:
    """Returns the chart of the request duration: its 99th percentile and its median."""
    p99, p50 = history.quantiles((0.99, 0.5), DURATION, edges, **where).get((), (None, None))
    return plot("Response time", edges, {"p99": p99, "p50": p50}, units.seconds)


def _by_worker(history: History, edges: Floats, **where: str) -> list[Markup]:
    by = ("target",)
    requests = history.rates("ringmesh_worker_requests_total", edges, by, **where)
    compute = history.rates(f"{STAGE}_sum", edges, by, stage="compute", **where)
    queued = history.gauges("ringmesh_worker_queue_depth", edges, by, **where)
    total, count = (history.rates(f"{ATTEMPT}_{part}", edges, ("worker",)) for part in ("sum", "count"))
    shown = _largest(requests)
    return [
        plot("Requests/s on the worker", edges, _lines(requests, shown), units.number),
        plot(
            "Time of an attempt, mean of all models", edges, _lines(overview.ratios(total, count), shown), units.seconds
        ),
        plot("Requests that wait for a batch", edges, _lines(queued, shown), units.number),
        plot("Compute time per second", edges, _lines(compute, shown), units.seconds),
    ]


def _largest(curves: Mapping[Labels, Floats]) -> Sequence[Labels]:
    """Returns the groups with the largest sums, in order of their names."""
    return sorted(sorted(curves, key=lambda key: -np.nansum(curves[key]))[:_MAX_LINES])


def _lines(curves: Mapping[Labels, Floats], shown: Sequence[Labels]) -> dict[str, Floats | None]:
    return {" ".join(key) or "(none)": curves.get(key) for key in shown}
