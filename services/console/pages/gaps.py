"""Explains the parts of a span that none of its child spans covers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.console.data import span_names as names
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan

# Shorter gaps are not explained: the larger of a share of the trace and a time in ns.
_LEAST_SHARE = 0.02
_LEAST_NS = 50_000
# A wait at one end of an attempt that is this many times as long as at the other end is not explained by the network.
_UNEVEN = 3
_TRANSIT = "on the way between the router and the worker"


@dataclass(frozen=True, slots=True)
class Gap:
    """A part of `span` without a child span, in ns, and what happens in it, as the end of a sentence."""

    span: StoredSpan
    start_ns: int
    end_ns: int
    text: str

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


def find(tree: SpanTree) -> list[Gap]:
    """Returns the gaps that are long enough to matter, in the order of the spans."""
    least = max(_LEAST_NS, _LEAST_SHARE * tree.duration_ns)
    below: dict[str, list[StoredSpan]] = {}
    for _, span in tree.rows:
        below.setdefault(span.parent_id, []).append(span)
    gaps = (gap for _, span in tree.rows for gap in _gaps(span, below.get(span.span_id, ())))
    return [gap for gap in gaps if gap.duration_ns >= least]


def _gaps(span: StoredSpan, below: Sequence[StoredSpan]) -> Iterator[Gap]:
    children = [child for child in below if child is not span]
    if not children:
        return
    children.sort(key=lambda child: child.start_ns)
    end_ns = max(child.end_ns for child in children)
    before, between, after = _texts(span, children[0].start_ns - span.start_ns, span.end_ns - end_ns)
    yield Gap(span, span.start_ns, children[0].start_ns, before)
    reached = children[0].end_ns
    for child in children[1:]:
        yield Gap(span, reached, child.start_ns, between)
        reached = max(reached, child.end_ns)
    yield Gap(span, end_ns, span.end_ns, after)


def _texts(span: StoredSpan, before: int, after: int) -> tuple[str, str, str]:
    """Returns what a span does before, between and after its child spans. `before` and `after` are times in ns."""
    if names.is_attempt(span):
        return (
            "waiting in the router for earlier envelopes of the model" if before > _UNEVEN * after else _TRANSIT,
            _TRANSIT,
            "waiting for other requests in the same envelope" if after > _UNEVEN * before else _TRANSIT,
        )
    if span.name == names.BATCH:
        return "copying the inputs into the batch", "between two runs of the batch", "copying the outputs of the batch"
    if span.short_name == names.EXECUTE:
        return (
            "decoding the request on the worker",
            "on the worker between two steps",
            "encoding the answer on the worker",
        )
    if span.service == "ringmesh-router":
        return (
            "in the router before the first step: decoding, admission, look-up in its memory",
            "in the router between two steps",
            "in the router after the last step: storing and sending the answer",
        )
    elsewhere = f"in {span.service}, or on the way to the next service"
    return elsewhere, elsewhere, elsewhere
