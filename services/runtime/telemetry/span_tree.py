"""Spans read back from storage, and the tree order in which a trace is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A finished span. Times in ns since the Unix epoch; `error` is "" on success."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int
    error: str
    attributes: dict[str, Any]
    kind: str = ""
    instance: str = ""
    # Each event has a `name` and `attributes`.
    events: tuple[Any, ...] = ()
    links: tuple[Any, ...] = ()

    @property
    def short_name(self) -> str:
        """The name without the service: for an RPC, its method."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class SpanTree:
    """The spans of one trace, in tree order, each with its depth. A span whose parent is elsewhere is a root."""

    trace_id: str
    rows: tuple[tuple[int, StoredSpan], ...]

    @cached_property
    def start_ns(self) -> int:
        return min(span.start_ns for _, span in self.rows)

    @cached_property
    def end_ns(self) -> int:
        return max(span.end_ns for _, span in self.rows)

    @cached_property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


def trees(spans: Iterable[StoredSpan]) -> list[SpanTree]:
    by_id: dict[str, list[StoredSpan]] = {}
    for span in spans:
        by_id.setdefault(span.trace_id, []).append(span)
    return [SpanTree(trace_id, tuple(_in_order(members))) for trace_id, members in by_id.items()]


def _in_order(spans: list[StoredSpan]) -> Iterable[tuple[int, StoredSpan]]:
    spans = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    known = {span.span_id for span in spans}
    children: dict[str, list[StoredSpan]] = {}
    for span in spans:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else ""
        children.setdefault(parent, []).append(span)
    # Spans are untrusted: one that is its own ancestor is treated as a root, and each is yielded once.
    yielded: set[int] = set()
    for root in [*children.get("", []), *spans]:
        stack = [(0, root)]
        while stack:
            depth, span = stack.pop()
            if id(span) not in yielded:
                yielded.add(id(span))
                yield depth, span
                stack.extend((depth + 1, child) for child in reversed(children.get(span.span_id, [])))
