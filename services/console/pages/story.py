"""A plain-language account of a trace: the decisions, their reasons, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator

from services.console.data import span_names as names
from services.console.data.trace_store import TraceSummary
from services.console.data.units import clock, nanoseconds
from services.console.pages import gaps
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan

# Share of the trace from which on a gap is part of the account.
_LONG_GAP = 0.1
_OUTCOMES = {
    "hit-local": "The router's own memory had the answer.",
    "hit-shared": "The shared cache tier had the answer.",
    "hit-semantic": "The cache had the answer to a similar request.",
    "hit-peer": "The cache of another region had the answer.",
    "joined": "The same request was being computed already: this one waited for that answer.",
    "miss": "No cache had the answer, so it was computed.",
    "bypass": "It was computed without the caches.",
}


def tell(summary: TraceSummary, tree: SpanTree) -> list[str]:
    """Returns one sentence for each step of the request."""
    return [*_opening(summary), *(line for _, span in tree.rows for line in _line(span)), *_closing(summary, tree)]


def _opening(summary: TraceSummary) -> Iterator[str]:
    what = f"A request for {summary.model} {summary.version}".rstrip() if summary.model else "A request"
    whose = f" of tenant {summary.tenant}" if summary.tenant else ""
    at, took = clock(summary.start_ns), nanoseconds(summary.duration_ns)
    if summary.error:
        code = f" with {summary.code}" if summary.code else ""
        yield f"{what}{whose} arrived at {at} and failed{code} after {took}: {summary.error}"
    else:
        yield f"{what}{whose} arrived at {at} and was answered after {took}."
    if summary.cache in _OUTCOMES:
        yield _OUTCOMES[summary.cache]


def _line(span: StoredSpan) -> Iterator[str]:
    attributes = span.attributes
    took = nanoseconds(span.end_ns - span.start_ns)
    if reason := attributes.get(names.REASON):
        bypassed = attributes.get(names.OUTCOME) in (None, "bypass")
        yield f"The {'caches were not used' if bypassed else 'shared tier'}: {reason}."
    elif span.name == names.SHARED and not attributes.get(names.HIT):
        yield f"The shared tier gave no answer, which took {took} to find out."
    elif names.is_attempt(span):
        yield from _attempt(span, took)
    elif span.short_name == names.EXECUTE and attributes.get(names.JOINED):
        yield f"The worker was computing the same request already; this one waited {took} for it."
    elif span.name == names.STEP:
        yield f"Then the ensemble's step {attributes.get(names.MODEL, '(unnamed)')}, which took {took}."
    elif span.name == names.QUEUE:
        yield f"On the worker it waited {took} for a batch to start."
    elif span.name == names.BATCH:
        requests, rows = attributes.get(names.BATCH_REQUESTS, 1), attributes.get(names.BATCH_ROWS, 1)
        of = "alone" if requests == 1 else f"in a batch of {requests} requests"
        yield f"It ran {of}, {rows} {'row' if rows == 1 else 'rows'} in all, for {took}."
    elif span.name == names.RUN:
        yield f"ONNX Runtime computed on {attributes.get(names.PROVIDER, 'an unknown provider')} for {took}."


def _attempt(span: StoredSpan, took: str) -> Iterator[str]:
    """Yields the candidates that were skipped, and the result of the attempt."""
    attributes = span.attributes
    for event in span.events:
        candidate = event["attributes"]
        if event["name"] == names.CANDIDATE and not candidate.get(names.TAKEN):
            rank, why = candidate.get(names.RANK), candidate.get(names.WHY)
            yield f"{candidate.get(names.WORKER)}, rank {rank} on the ring for its key, was skipped: {why}."
    worker, rank = attributes.get(names.WORKER, "a worker"), attributes.get(names.RANK)
    position = "the owner of its key" if rank == 0 else f"rank {rank} on the ring for its key"
    if span.error:
        yield f"It was sent to {worker}, {position}, and failed there after {took}: {span.error}."
    else:
        yield f"It was sent to {worker}, {position}, and was answered after {took}."


def _closing(summary: TraceSummary, tree: SpanTree) -> Iterator[str]:
    """Yields the long gaps, and the span without children that took most of the time, if one did."""
    total = max(1, summary.duration_ns)
    for gap in gaps.find(tree):
        if gap.duration_ns >= _LONG_GAP * total:
            yield f"{nanoseconds(gap.duration_ns)} of {nanoseconds(total)} passed {gap.text}."
    parents = {span.parent_id for _, span in tree.rows}
    leaves = [span for _, span in tree.rows if span.span_id not in parents]
    longest = max(leaves, key=lambda span: span.end_ns - span.start_ns, default=tree.rows[0][1])
    took = longest.end_ns - longest.start_ns
    # For a joined request the wait is mentioned already.
    if took > 0.5 * total and len(tree.rows) > 1 and summary.cache != "joined":
        yield f"Most of the time, {nanoseconds(took)}, was spent in “{longest.short_name}” on {longest.service}."
