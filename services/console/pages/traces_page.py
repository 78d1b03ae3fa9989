"""The trace pages: a search over recent traces, and one trace as a waterfall with a plain-language account."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import nlargest
from operator import attrgetter
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import span_names, units
from services.console.data.overview import OUTCOMES
from services.console.data.sources import Sources
from services.console.data.trace_store import TraceQuery, TraceSummary
from services.console.pages import gaps, story
from services.console.pages.fleet_page import Row
from services.console.pages.live import Context
from services.console.security import visitor_of
from services.console.visitor import Visitor
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan

_LIMIT = 100
_MOST_BARS = 16
# Bounds of the histogram's bars in each power of ten, the finest that fit.
_STEPS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,))


@dataclass(frozen=True, slots=True)
class WaterfallRow:
    """A row of the waterfall. `start` and `width` are shares of the trace's duration, 0 to 1.

    `gap`: what happens in this part of the span, which no child span covers; "" for the row of the span itself.
    """

    span: StoredSpan
    depth: int
    start: float
    width: float
    gap: str

    @property
    def step(self) -> str:
        """The model of an ensemble step; "" for other spans."""
        return str(self.span.attributes.get(span_names.MODEL, "")) if self.span.name == span_names.STEP else ""


async def listing(sources: Sources, request: Request) -> Context:
    query, problem = _query(request)
    sort = request.query_params.get("sort", "")
    store, visitor = sources.traces, visitor_of(request)
    seen: dict[str, set[str]] = {"model": set(), "tenant": set(), "worker": set()}
    found = []
    for summary in store.summaries():
        if not visitor.sees(summary.tenant, summary.model):
            continue
        for part, values in seen.items():
            values.add(getattr(summary, part))
        if not problem and query.matches(summary):
            found.append(summary)
    shown = nlargest(_LIMIT, found, key=attrgetter("duration_ns" if sort == "slowest" else "start_ns"))
    return {
        "query": query,
        "sort": sort,
        "problem": problem,
        "found": shown,
        "count": len(found),
        "longest": max((summary.duration_ns for summary in shown), default=0),
        "store": store,
        "is_whole": not any(visitor.limits),
        "models": sorted(seen["model"] - {""}),
        "tenants": sorted(seen["tenant"] - {""}),
        "workers": sorted(seen["worker"] - {""}),
        "outcomes": OUTCOMES,
        "histogram": _histogram(request, found),
        "compare": request.query_params.get("compare", ""),
    }


async def one(sources: Sources, request: Request) -> Context:
    """Returns the context of `trace.html`. Raises HTTPException 404 if the trace is not stored."""
    summary, tree = stored(sources, request, request.path_params["trace_id"].lower())
    total = max(1, tree.duration_ns)
    return {
        "summary": summary,
        "rows": _waterfall(tree),
        "total_ns": total,
        "story": story.tell(summary, tree),
        "linked": _linked(sources, tree, visitor_of(request)),
        "elsewhere": sources.trace_ui.replace("{trace_id}", tree.trace_id),
    }


def stored(sources: Sources, request: Request, trace_id: str) -> tuple[TraceSummary, SpanTree]:
    """Returns a trace. Raises HTTPException 404 if it is not stored, or not for the visitor."""
    found = sources.traces.find(trace_id)
    if found is None or not visitor_of(request).sees(found[0].tenant, found[0].model):
        raise HTTPException(
            404,
            f"Trace {trace_id} is not stored. Spans arrive about a second after a sampled request; "
            "the oldest are dropped when memory is full.",
        )
    return found


def _waterfall(tree: SpanTree) -> list[WaterfallRow]:
    """Returns the spans in tree order, and each long gap between the children of its span."""
    total = max(1, tree.duration_ns)

    def row(span: StoredSpan, depth: int, start_ns: int, end_ns: int, gap: str = "") -> WaterfallRow:
        return WaterfallRow(span, depth, (start_ns - tree.start_ns) / total, (end_ns - start_ns) / total, gap)

    rows = [row(span, depth, span.start_ns, span.end_ns) for depth, span in tree.rows]
    for gap in gaps.find(tree):
        index = next(index for index, one in enumerate(rows) if one.span is gap.span and not one.gap)
        made = row(gap.span, rows[index].depth + 1, gap.start_ns, gap.end_ns, gap.text)
        following = range(index + 1, len(rows))
        ends = (i for i in following if (rows[i].depth, -rows[i].start) <= (made.depth, -made.start))
        rows.insert(next(ends, len(rows)), made)
    return rows


def _linked(sources: Sources, tree: SpanTree, visitor: Visitor) -> list[tuple[str, str, bool]]:
    """Returns the traces that spans link to: the span, the trace id, and whether the visitor can open the trace."""
    seen: dict[str, str] = {}
    for _, span in tree.rows:
        for other, _ in span.links:
            if other != tree.trace_id:
                seen.setdefault(other, span.short_name)

    def is_open(other: str) -> bool:
        found = sources.traces.find(other)
        return found is not None and visitor.sees(found[0].tenant, found[0].model)

    return [(name, other, is_open(other)) for other, name in seen.items()]


def _histogram(request: Request, found: Sequence[TraceSummary]) -> list[Row]:
    """Returns how many traces took how long, as up to _MOST_BARS bars with a link to these traces."""
    for steps in _STEPS:
        bounds = [step * 10.0**power for power in range(-3, 6) for step in steps]
        bars = [bisect(bounds, summary.duration_ns / 1e6) for summary in found]
        if max(bars, default=0) - min(bars, default=0) < _MOST_BARS:
            break
    counts, failed = Counter(bars), Counter(bar for bar, one in zip(bars, found, strict=True) if one.error)
    rows = []
    for bar in range(min(bars, default=0), max(bars, default=-1) + 1):
        low, high = ([0.0, *bounds][bar], [*bounds, math.inf][bar])
        limits = {"min_ms": f"{low:g}", **({} if math.isinf(high) else {"max_ms": f"{high:g}"})}
        rows.append(
            {
                "label": f"< {units.seconds(high / 1e3)}" if high < math.inf else f"≥ {units.seconds(low / 1e3)}",
                "count": counts[bar],
                "failed": failed[bar],
                "share": counts[bar] / max(counts.values()),
                "failed_share": failed[bar] / max(counts.values()),
                "link": f"/traces?{urlencode({**request.query_params, **limits})}",
            }
        )
    return rows


def _query(request: Request) -> tuple[TraceQuery, str]:
    """Parses the search. Returns the query and "", or an empty query and an error message."""
    given = {field.name: request.query_params.get(field.name, "").strip() for field in fields(TraceQuery)}
    limits = {}
    for name in ("min_ms", "max_ms"):
        text = given.pop(name)
        try:
            limits[name] = float(text or 0)
        except ValueError:
            return TraceQuery(), f"“{text}” is not a number of milliseconds."
    return TraceQuery(**given, **limits), ""  # type: ignore[arg-type]
