"""The trace pages: a search over recent traces, and one trace as a waterfall with a plain-language account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import nlargest
from operator import attrgetter

from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import span_names
from services.console.data.overview import OUTCOMES
from services.console.data.sources import Sources
from services.console.data.trace_store import TraceQuery
from services.console.pages import story
from services.console.pages.live import Context
from services.runtime.telemetry.span_tree import StoredSpan

_LIMIT = 100


@dataclass(frozen=True, slots=True)
class WaterfallRow:
    """A row of the waterfall. `start` and `width` are shares of the trace's duration, 0 to 1."""

    span: StoredSpan
    depth: int
    start: float
    width: float

    @property
    def step(self) -> str:
        """The model of an ensemble step; "" for other spans."""
        return str(self.span.attributes.get(span_names.MODEL, "")) if self.span.name == span_names.STEP else ""


async def listing(sources: Sources, request: Request) -> Context:
    """Returns the context of `traces.html`."""
    query, problem = _query(request)
    sort = request.query_params.get("sort", "")
    store = sources.traces
    seen: dict[str, set[str]] = {"model": set(), "tenant": set(), "worker": set()}
    found = []
    for summary in store.summaries():
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
        "models": sorted(seen["model"] - {""}),
        "tenants": sorted(seen["tenant"] - {""}),
        "workers": sorted(seen["worker"] - {""}),
        "outcomes": OUTCOMES,
    }


async def one(sources: Sources, request: Request) -> Context:
    """Returns the context of `trace.html`. Raises HTTPException 404 if the trace is not stored."""
    trace_id = request.path_params["trace_id"].lower()
    found = sources.traces.find(trace_id)
    if found is None:
        raise HTTPException(
            404,
            f"Trace {trace_id} is not stored. Spans arrive about a second after a sampled request; "
            "the oldest are dropped when memory is full.",
        )
    summary, tree = found
    total = max(1, tree.duration_ns)
    bars = [
        WaterfallRow(span, depth, (span.start_ns - tree.start_ns) / total, (span.end_ns - span.start_ns) / total)
        for depth, span in tree.rows
    ]
    return {
        "summary": summary,
        "bars": bars,
        "total_ns": total,
        "story": story.tell(summary, tree),
        "linked": _linked(sources, summary.trace_id, bars),
        "elsewhere": sources.trace_ui.replace("{trace_id}", trace_id),
    }


def _linked(sources: Sources, trace_id: str, bars: Sequence[WaterfallRow]) -> list[tuple[str, str, bool]]:
    """Returns the traces that spans of this one link to: the span, the trace id, and whether the trace is stored."""
    seen: dict[str, str] = {}
    for bar in bars:
        for other, _ in bar.span.links:
            if other != trace_id:
                seen.setdefault(other, bar.span.short_name)
    return [(name, other, sources.traces.find(other) is not None) for other, name in seen.items()]


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
