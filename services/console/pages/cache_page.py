"""The cache page: caches by tier, by model and by key, and purges."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.fleet_watch import ask
from services.console.data.history import History, Line
from services.console.data.overview import COMPUTE, HITS, MOST_ROWS, NOW_SECONDS, REDIS, REQUESTS, SPAN_SECONDS, span
from services.console.data.sources import Sources
from services.console.pages import form
from services.console.pages.chart import plot
from services.console.pages.live import Context

_KEYS = 15
_PURGE_SECONDS = 10.0
SCOPES = ("model", "tenant", "key", "everything")


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier of one process. Rates are per second; bytes and entries are known for local tiers only."""

    process: str
    tier: str
    hits: float
    misses: float
    fills: float
    evictions: float
    failures: float
    entries: float
    bytes: float

    @property
    def ratio(self) -> float:
        """The share of look-ups that were hits."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else math.nan


@dataclass(frozen=True, slots=True)
class UseRow:
    """Cache use of a model and tenant within the charts' time span. `saved` and `spent` are seconds of compute time."""

    model: str
    tenant: str
    hits: float
    misses: float
    saved: float
    spent: float

    @property
    def ratio(self) -> float:
        """The share of answers that came from a cache."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else math.nan


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A cache key, and how often it occurs in the stored traces."""

    key: str
    model: str
    count: int
    hits: int


async def contents(sources: Sources, request: Request) -> Context:
    """Returns the context of `cache.html`. A POST purges first."""
    history = sources.history
    notice, problem = await _purge(sources, request) if request.method == "POST" else ("", "")
    uses = _uses(history)
    p99, p50 = history.quantiles((0.99, 0.5), REDIS, *span(history), operation="get")
    breakers = history.last("ringmesh_redis_breaker_open", ("target",))
    return {
        "notice": notice,
        "problem": problem,
        "scopes": SCOPES,
        "models": sorted({model.name for model in sources.view.models}),
        "tiers": _tiers(history),
        "uses": uses,
        "most": MOST_ROWS,
        "keys": _keys(sources),
        "vitals": overview.vitals(history),
        "saved": sum(row.saved for row in uses),
        "breakers": [(target, bool(is_open)) for (target,), is_open in sorted(breakers.items())],
        "redis": [
            (target, operation, value)
            for (target, operation), value in sorted(
                history.quantile(0.99, REDIS, NOW_SECONDS, ("target", "operation")).items()
            )
        ],
        "charts": [
            plot("From the cache", [Line("hit ratio", overview.hit_ratio(history))], units.percent, least=1.0),
            plot("Compute saved, a second", [Line("saved", overview.saved(history))], units.seconds),
            plot(
                "Redis, look-ups",
                [Line("p99", p99), Line("p50", p50)],
                units.seconds,
            ),
            plot(
                "Memory of the local tiers",
                [Line("held", history.gauge("ringmesh_cache_bytes", *span(history)))],
                units.size,
            ),
        ],
    }


async def _purge(sources: Sources, request: Request) -> tuple[str, str]:
    """Returns (success message, error message), one of which is ""."""
    sent = await form.read(request)
    scope, value = sent.get("scope", ""), sent.get("value", "").strip()
    if scope not in SCOPES or (scope != "everything" and not value):
        return "", "Say what to purge: a model, a tenant or a key by its name, or everything."
    try:
        given: bool | str | bytes = True if scope == "everything" else bytes.fromhex(value) if scope == "key" else value
    except ValueError:
        return "", f"“{value}” is not a key: 64 hexadecimal digits, as `ringmesh explain` tells them."
    # Prefer a router, which knows the models.
    answering = (router.address for router in sources.view.routers if not router.problem)
    address = next(answering, sources.view.cache.address)
    stub = cache_pb2_grpc.CacheServiceStub(sources.fleet.channel(address))
    purge = cache_pb2.PurgeRequest(**{scope: given})  # type: ignore[arg-type]
    done, problem = await ask(lambda: stub.Purge(purge, timeout=_PURGE_SECONDS))
    if done is None:
        return "", f"Not purged. {address} answers: {problem}."
    what = "Everything" if scope == "everything" else f"The {scope} {value}"
    warning = f" But {done.warning}." if done.warning else ""
    return f"{what} was purged; {done.confirmed} processes confirmed it.{warning}", ""


def _tiers(history: History) -> list[TierRow]:
    by = ("target", "tier")
    looks = history.rate("ringmesh_cache_lookups_total", NOW_SECONDS, (*by, "result"))
    rates = {
        name: history.rate(f"ringmesh_cache_{name}_total", NOW_SECONDS, by)
        for name in ("fills", "evictions", "failures")
    }
    held = {name: history.last(f"ringmesh_cache_{name}", by) for name in ("entries", "bytes")}
    return [
        TierRow(
            process,
            tier,
            looks.get((process, tier, "hit"), 0.0),
            looks.get((process, tier, "miss"), 0.0),
            *(rates[name].get((process, tier), math.nan) for name in rates),
            *(held[name].get((process, tier), math.nan) for name in held),
        )
        for process, tier in sorted({(process, tier) for process, tier, _ in looks})
    ]


def _uses(history: History) -> list[UseRow]:
    by = ("model", "tenant", "outcome")
    answers = history.increase(REQUESTS, SPAN_SECONDS, by, code="OK")
    compute = history.increase(COMPUTE, SPAN_SECONDS, by)

    # Hits, misses, saved, spent.
    sums: dict[tuple[str, str], list[float]] = {}
    for place, values in ((0, answers), (2, compute)):
        for (model, tenant, outcome), value in values.items():
            sums.setdefault((model, tenant), [0.0] * 4)[place + (outcome not in HITS)] += value
    rows = [UseRow(*who, *parts) for who, parts in sums.items()]
    return sorted((row for row in rows if row.hits + row.misses), key=lambda row: -row.saved)


def _keys(sources: Sources) -> list[KeyRow]:
    """Returns the most frequent keys in traces. Traces are a sample of the requests, at the same rate for every key."""
    seen: Counter[tuple[str, str]] = Counter()
    hits: Counter[tuple[str, str]] = Counter()
    for summary in sources.traces.summaries():
        if summary.key:
            seen[summary.key, summary.model] += 1
            hits[summary.key, summary.model] += summary.cache in HITS
    return [KeyRow(key, model, count, hits[key, model]) for (key, model), count in seen.most_common(_KEYS) if count > 1]
