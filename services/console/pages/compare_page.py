"""The comparison of two traces, span by span."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

from starlette.requests import Request

from services.console.data.sources import Sources
from services.console.pages import story, traces_page
from services.console.pages.live import Context
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan

# The names of a span and its ancestors, and how many such spans come before it.
_Key: TypeAlias = tuple[tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class SpanPair:
    """The spans at the same position in two traces; None if one trace has no such span."""

    depth: int
    name: str
    service: str
    first: StoredSpan | None
    second: StoredSpan | None

    @property
    def longer_ns(self) -> int | None:
        """How much longer the second span took; None if one is missing."""
        if self.first is None or self.second is None:
            return None
        return (self.second.end_ns - self.second.start_ns) - (self.first.end_ns - self.first.start_ns)


async def contents(sources: Sources, request: Request) -> Context:
    """Returns the context of `compare.html`. Raises HTTPException 404 if a trace is not stored."""
    traces = [traces_page.stored(sources, request, request.query_params.get(name, "").lower()) for name in ("a", "b")]
    (_, first), (_, second) = traces
    return {
        "traces": [{"summary": summary, "tree": tree, "story": story.tell(summary, tree)} for summary, tree in traces],
        "pairs": _pairs(first, second),
        "longest_ns": max(first.duration_ns, second.duration_ns, 1),
    }


def _pairs(first: SpanTree, second: SpanTree) -> list[SpanPair]:
    """Returns the spans of both traces in the order of the first; those of the second only follow their parents."""
    left, right = _by_position(first), _by_position(second)
    order = [*left]
    previous: _Key | None = None
    for key in right:
        if key not in left:
            order.insert(order.index(previous) + 1 if previous is not None else 0, key)
        previous = key
    pairs = []
    for key in order:
        span = left.get(key) or right[key]
        pairs.append(SpanPair(len(key[0]) - 1, span.short_name, span.service, left.get(key), right.get(key)))
    return pairs


def _by_position(tree: SpanTree) -> dict[_Key, StoredSpan]:
    path: list[str] = []
    seen: Counter[tuple[str, ...]] = Counter()
    found = {}
    for depth, span in tree.rows:
        path[depth:] = [f"{span.service} {span.short_name}"]
        position = tuple(path)
        found[position, seen[position]] = span
        seen[position] += 1
    return found
