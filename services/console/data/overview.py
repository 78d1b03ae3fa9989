"""Key metrics of the fleet, from the history of its metrics."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.console.data.history import Floats, History, Labels, Values, add

NOW_SECONDS = 60.0
SPAN_SECONDS = 900.0
# Maximum rows of a sorted table, so that hundreds of models fit on a page.
MOST_ROWS = 60

REQUESTS = "ringmesh_requests_total"
DURATION = "ringmesh_request_duration_seconds"
COMPUTE = "ringmesh_compute_seconds_total"
STAGE = "ringmesh_worker_stage_seconds"
ATTEMPT = "ringmesh_attempt_duration_seconds"
REDIS = "ringmesh_redis_duration_seconds"
LOOP_LAG = "ringmesh_event_loop_lag_seconds"
HITS = ("hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined")
COMPUTED = ("miss", "bypass")
OUTCOMES = (*HITS, *COMPUTED)
# Status codes of server errors where the outcome is "error"; all others are errors of the caller.
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
    return vitals_by(history, ()).get((), idle(history))


def vitals_by(history: History, by: Sequence[str]) -> dict[Labels, Vitals]:
    """Returns the key metrics by the labels `by`, for the values that have had requests since the process started."""
    codes = history.rate(REQUESTS, NOW_SECONDS, (*by, "code"))
    ok = subtotals(codes, ("OK",))
    hits = subtotals(history.rate(REQUESTS, NOW_SECONDS, (*by, "outcome"), code="OK"), HITS)
    compute = history.rate(COMPUTE, NOW_SECONDS, (*by, "outcome"))
    saved, spent = subtotals(compute, HITS), subtotals(compute, COMPUTED)
    p50, p99 = (history.quantile(q, DURATION, NOW_SECONDS, by) for q in (0.5, 0.99))
    return {
        group: Vitals(
            requests=requests,
            errors=requests - ok.get(group, 0.0),
            hit_ratio=hits.get(group, 0.0) / ok[group] if ok.get(group) else math.nan,
            p50=p50[group],
            p99=p99[group],
            saved=saved.get(group, 0.0),
            spent=spent.get(group, 0.0),
        )
        for group, requests in subtotals(codes).items()
    }


def idle(history: History) -> Vitals:
    """Returns the key metrics of a group without requests: zero rates, or NaN if no router was scraped yet."""
    rate = 0.0 if history.knows(REQUESTS) else math.nan
    return Vitals(rate, rate, math.nan, math.nan, math.nan, 0.0, 0.0)


def means(history: History, name: str, seconds: float, by: Sequence[str], **where: str) -> Values:
    """Returns the mean of a histogram's observations by group. Omits groups without observations."""
    total, count = (history.increase(f"{name}_{part}", seconds, by, **where) for part in ("sum", "count"))
    return Values({key: total[key] / observed for key, observed in count.items() if observed})


def subtotals(values: Mapping[Labels, Any], included: Container[str] | None = None) -> dict[Labels, Any]:
    """Sums values or curves that differ only in their last label, which is one of `included`. None: all are."""
    sums: dict[Labels, Any] = {}
    for (*group, label), value in values.items():
        if included is None or label in included:
            key = tuple(group)
            sums[key] = add(sums[key], value) if key in sums else value
    return sums


def hit_ratio(history: History, times: Floats, by: Sequence[str] = (), **where: str) -> dict[Labels, Floats]:
    """Returns the share of successful answers from a cache or a joined computation; NaN if there were none."""
    answers = history.rates(REQUESTS, times, (*by, "outcome"), code="OK", **where)
    return ratios(subtotals(answers, HITS), subtotals(answers))


def saved(history: History, times: Floats, by: Sequence[str] = (), **where: str) -> dict[Labels, Floats]:
    """Returns the seconds of compute time saved per second."""
    return subtotals(history.rates(COMPUTE, times, (*by, "outcome"), **where), HITS)


def ratios(parts: Mapping[Labels, Floats], wholes: Mapping[Labels, Floats]) -> dict[Labels, Floats]:
    """Divides curves by group; a missing part is 0, and the ratio is NaN where the whole is 0 or unknown."""
    return {
        key: np.divide(np.nan_to_num(parts.get(key, 0.0)), whole, out=np.full_like(whole, math.nan), where=whole > 0)
        for key, whole in wholes.items()
    }
