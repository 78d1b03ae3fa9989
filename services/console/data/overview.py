"""Key metrics of the fleet, from the history of its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.console.data.history import Curve, History, Labels, Line

NOW_SECONDS = 60.0
SPAN_SECONDS = 900.0
# Maximum rows of a sorted table, so that hundreds of models fit on a page.
MOST_ROWS = 60
STEP_SECONDS = 10.0
# Time span and step of charts while the console is young, so that the little data there is fills the chart.
_YOUNG = (180.0, 5.0)

REQUESTS = "ringmesh_requests_total"
DURATION = "ringmesh_request_duration_seconds"
COMPUTE = "ringmesh_compute_seconds_total"
STAGE = "ringmesh_worker_stage_seconds"
ATTEMPT = "ringmesh_attempt_duration_seconds"
REDIS = "ringmesh_redis_duration_seconds"
LOOP_LAG = "ringmesh_event_loop_lag_seconds"
HITS = ("hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined")
# Status codes of server errors; all others are errors of the caller.
SERVER_FAULTS = frozenset(
    {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "DATA_LOSS"}
)


@dataclass(frozen=True, slots=True)
class Vitals:
    """Key metrics over the last minute: times in seconds, rates per second, NaN if unknown."""

    requests: float
    errors: float
    hit_ratio: float
    p50: float
    p99: float
    saved: float
    spent: float


def vitals(history: History) -> Vitals:
    """Returns the key metrics of all requests."""
    return vitals_by(history, ()).get((), unasked(history))


def vitals_by(history: History, by: Sequence[str]) -> dict[Labels, Vitals]:
    """Returns the key metrics by the labels `by`, for the values that have had requests since the process started."""
    answers: dict[Labels, dict[Labels, float]] = {}
    for (*key, outcome, code), rate in history.rate(REQUESTS, NOW_SECONDS, (*by, "outcome", "code")).items():
        answers.setdefault(tuple(key), {})[outcome, code] = rate
    compute: dict[Labels, dict[str, float]] = {}
    for (*key, outcome), rate in history.rate(COMPUTE, NOW_SECONDS, (*by, "outcome")).items():
        compute.setdefault(tuple(key), {})[outcome] = rate
    p50, p99 = (history.quantile(q, DURATION, NOW_SECONDS, by) for q in (0.5, 0.99))
    found = {}
    for group, rates in answers.items():
        ok = sum(rate for (_, code), rate in rates.items() if code == "OK")
        hits = sum(rate for (outcome, code), rate in rates.items() if code == "OK" and outcome in HITS)
        computed = compute.get(group, {})
        found[group] = Vitals(
            requests=sum(rates.values()),
            errors=sum(rates.values()) - ok,
            hit_ratio=hits / ok if ok else math.nan,
            p50=p50.get(group, math.nan),
            p99=p99.get(group, math.nan),
            saved=sum(rate for outcome, rate in computed.items() if outcome in HITS),
            spent=sum(rate for outcome, rate in computed.items() if outcome not in HITS),
        )
    return found


def unasked(history: History) -> Vitals:
    """Returns the key metrics of a group without requests: zero rates, or NaN if no router was scraped yet."""
    none = 0.0 if history.knows(REQUESTS) else math.nan
    return Vitals(none, none, math.nan, math.nan, math.nan, 0.0, 0.0)


def span(history: History) -> tuple[float, float]:
    """Returns the time span and the step of charts, in seconds."""
    return _YOUNG if history.watched(SPAN_SECONDS) < _YOUNG[0] else (SPAN_SECONDS, STEP_SECONDS)


def requests(history: History, **where: str) -> Curve:
    """Returns requests per second."""
    seconds, step = span(history)
    return history.rates(REQUESTS, seconds, step, **where)


def errors(history: History, **where: str) -> Curve:
    """Returns failed requests per second."""
    return _minus(requests(history, **where), requests(history, code="OK", **where))


def hit_ratio(history: History, **where: str) -> Curve:
    """Returns the share of successful answers from a cache or a joined computation; NaN if there were none."""
    seconds, step = span(history)
    ok = history.rates(REQUESTS, seconds, step, code="OK", **where)
    curves = [history.rates(REQUESTS, seconds, step, code="OK", outcome=hit, **where) for hit in HITS]
    hits = [sum(_zero(curve.values[i]) for curve in curves) for i in range(len(ok.values))]
    return Curve(ok.times, [hit / all_ if all_ > 0 else math.nan for hit, all_ in zip(hits, ok.values, strict=True)])


def latency(history: History, **where: str) -> list[Line]:
    """Returns the 99th percentile and the median of the request duration, in seconds."""
    seconds, step = span(history)
    p99, p50 = history.quantiles((0.99, 0.5), DURATION, seconds, step, **where)
    return [Line("p99", p99), Line("p50", p50)]


def saved(history: History, **where: str) -> Curve:
    """Returns the seconds of compute time saved per second."""
    seconds, step = span(history)
    curves = [history.rates(COMPUTE, seconds, step, outcome=hit, **where) for hit in HITS]
    steps = zip(*(curve.values for curve in curves), strict=True)
    return Curve(
        curves[0].times,
        [math.nan if all(map(math.isnan, step)) else math.fsum(map(_zero, step)) for step in steps],
    )


def _minus(all_: Curve, part: Curve) -> Curve:
    return Curve(
        all_.times,
        [a if math.isnan(a) else max(0.0, a - _zero(b)) for a, b in zip(all_.values, part.values, strict=True)],
    )


def _zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
