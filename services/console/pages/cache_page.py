"""The cache page: caches by tier, by model and by key, and purges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.fleet_watch import ask
from services.console.data.history import History
from services.console.data.overview import (
    COMPUTE,
    COMPUTED,
    HITS,
    MOST_ROWS,
    NOW_SECONDS,
    OUTCOMES,
    REDIS,
    REQUESTS,
    SPAN_SECONDS,
    subtotals,
)
from services.console.data.sources import Sources
from services.console.pages import form
from services.console.pages.chart import plot
from services.console.pages.confirmation import Confirmation
from services.console.pages.fleet_page import Row
from services.console.pages.live import Context
from services.console.pages.request_charts import ChartOptions
from services.console.security import visitor_of
from services.console.visitor import Visitor

_KEYS = 15
_PURGE_SECONDS = 10.0
SCOPES = ("model", "tenant", "key", "everything")


async def contents(sources: Sources, request: Request) -> Context:
    """Returns the context of `cache.html`. A POST purges first."""
    history = sources.history
    action = Confirmation()
    if request.method == "POST":
        action = await _purge(sources, await form.read(request), visitor_of(request))
    uses = _uses(history)
    options = ChartOptions(request)
    edges = options.edges(history)
    breakers = history.last("ringmesh_redis_breaker_open", ("target",))
    redis = history.quantile(0.99, REDIS, NOW_SECONDS, ("target", "operation"))
    p99, p50 = history.quantiles((0.99, 0.5), REDIS, edges, operation="get").get((), (None, None))
    hit_ratio, saved = overview.hit_ratio(history, edges).get(()), overview.saved(history, edges).get(())
    memory = history.gauges("ringmesh_cache_bytes", edges).get(())
    return {
        "action": action,
        "scopes": SCOPES,
        "models": sorted({model.name for model in sources.view.models}),
        "tiers": _tiers(history),
        "uses": uses,
        "most": MOST_ROWS,
        "keys": _keys(sources),
        "vitals": overview.vitals(history),
        "saved": sum(row["saved"] for row in uses),
        "breakers": [(target, is_open) for (target,), is_open in sorted(breakers.items())],
        "redis": [(*labels, p99) for labels, p99 in sorted(redis.items())],
        "switches": options.switches,
        "charts": [
            plot("From the cache", edges, {"hit ratio": hit_ratio}, units.percent, least=1.0),
            plot("Compute saved per second", edges, {"saved": saved}, units.seconds),
            plot("Redis look-ups", edges, {"p99": p99, "p50": p50}, units.seconds),
            plot("Memory of the local tiers", edges, {"used": memory}, units.size),
        ],
    }


async def _purge(sources: Sources, sent: Mapping[str, str], visitor: Visitor) -> Confirmation:
    """Purges what the form says, once it is confirmed, in the name of the visitor."""
    scope, value = sent.get("scope", ""), sent.get("value", "").strip()
    if scope not in SCOPES or (scope != "everything" and not value):
        return Confirmation(problem="Choose what to purge: a model, a tenant or a key by its name, or everything.")
    try:
        purged: bool | str | bytes = (
            True if scope == "everything" else bytes.fromhex(value) if scope == "key" else value
        )
    except ValueError:
        return Confirmation(
            problem=f"“{value}” is not a key: 64 hexadecimal digits, as `ringmesh explain` prints them."
        )
    what = scope if scope == "everything" else f"the {scope} {value}"
    if not sent.get("confirmed"):
        question = f"Purge {what}? Cached answers are dropped on all routers and computed again when requested."
        return Confirmation(question, {"scope": scope, "value": value}, f"Purge {what}")
    # Prefer a router, which knows the models.
    answering = (router.address for router in sources.view.routers if not router.problem)
    address = next(answering, sources.view.cache.address)
    purge = cache_pb2.PurgeRequest(**{scope: purged})  # type: ignore[arg-type]
    async with sources.fleet.calling(address, visitor.authorization) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        done, problem = await ask(lambda: stub.Purge(purge, timeout=_PURGE_SECONDS))
    if done is None:
        return Confirmation(problem=f"Not purged. {address} answers: {problem}.")
    warning = f" But {done.warning}." if done.warning else ""
    notice = f"{what[0].upper()}{what[1:]} was purged; {done.confirmed} processes confirmed it.{warning}"
    return Confirmation(notice=notice)


def _tiers(history: History) -> list[Row]:
    """Returns the tiers of each process. Rates are per second; bytes and entries are known for local tiers only."""
    by = ("target", "tier")
    lookups = history.rate("ringmesh_cache_lookups_total", NOW_SECONDS, (*by, "result"))
    hits, asked = subtotals(lookups, ("hit",)), subtotals(lookups)
    rates = {
        name: history.rate(f"ringmesh_cache_{name}_total", NOW_SECONDS, by)
        for name in ("fills", "evictions", "failures")
    }
    held = {name: history.last(f"ringmesh_cache_{name}", by) for name in ("entries", "bytes")}
    return [
        {
            "process": key[0],
            "tier": key[1],
            "ratio": hits.get(key, 0.0) / asked[key] if asked[key] else math.nan,
            "hits": hits.get(key, 0.0),
            "misses": asked[key] - hits.get(key, 0.0),
            **{name: values[key] for name, values in (rates | held).items()},
        }
        for key in sorted(asked)
    ]


def _uses(history: History) -> list[Row]:
    """Returns the answers and the seconds of compute time by model and tenant, the most compute time saved first."""
    by = ("model", "tenant", "outcome")
    answers = history.increase(REQUESTS, SPAN_SECONDS, by, code="OK")
    compute = history.increase(COMPUTE, SPAN_SECONDS, by)
    hits, saved, spent = subtotals(answers, HITS), subtotals(compute, HITS), subtotals(compute, COMPUTED)
    rows = [
        {
            "model": key[0],
            "tenant": key[1],
            "ratio": hits.get(key, 0.0) / answered,
            "hits": hits.get(key, 0.0),
            "misses": answered - hits.get(key, 0.0),
            "saved": saved.get(key, 0.0),
            "spent": spent.get(key, 0.0),
        }
        for key, answered in subtotals(answers).items()
        if answered
    ]
    return sorted(rows, key=lambda row: -row["saved"])


def _keys(sources: Sources) -> list[Row]:
    """Returns the most frequent keys in traces. Traces are a sample of the requests, at the same rate for every key."""
    seen: Counter[tuple[str, str]] = Counter()
    hits: Counter[tuple[str, str]] = Counter()
    for summary in sources.traces.summaries():
        # A refused request has no cached answer.
        if summary.key and summary.cache in OUTCOMES:
            seen[summary.key, summary.model] += 1
            hits[summary.key, summary.model] += summary.cache in HITS
    return [
        {"key": key, "model": model, "count": count, "hits": hits[key, model]}
        for (key, model), count in seen.most_common(_KEYS)
        if count > 1
    ]
