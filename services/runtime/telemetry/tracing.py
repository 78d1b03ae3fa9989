"""Traces: times are recorded for every request; when a request ends, spans are built if its trace is retained.

A trace is retained if the caller samples the request, if the caller does not decide and the configured ratio selects
it, if the request failed, or if it was slow (the router bounds their number). A worker returns its timings
with the answer, so that a complete trace can be retained after the fact: see docs/decisions/0013.
"""

from __future__ import annotations  # compiled by mypyc

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ringmesh.inference.v1 import inference_pb2

from services.runtime import w3c
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.span_export import SpanQueue
from services.runtime.telemetry.spans import Attributes, Event, Kind, Process, SharedAttributes, Span
from services.runtime.telemetry.worker_spans import run_spans, worker_spans
from services.runtime.w3c import new_span_id, new_trace_id

SPANS = Family(
    "ringmesh_trace_spans_total",
    "counter",
    "spans by destination (otlp, folder) and result: sent, or dropped by a full queue or by the destination",
    ("destination", "result"),
)


class SpanContent(Protocol):
    """The contents of a span, built only if the trace is retained."""

    def attributes(self) -> Attributes:
        """The attributes of the span."""

    def events(self) -> tuple[Event, ...]:
        """The events of the span."""


class Stage:
    """A part of a request; `result` is a worker's answer to it, `worker` that worker's id, `worker_type` its type."""

    def __init__(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        content: Attributes | SpanContent,
        span_id: str,
        kind: Kind,
        error: str,
        worker: str,
        worker_type: str,
        result: inference_pb2.WorkResult | None,
        parent_id: str,
    ) -> None:
        self.name = name
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.content = content
        self.span_id = span_id
        self.kind = kind
        self.error = error
        self.worker = worker
        self.worker_type = worker_type
        self.result = result
        # "": the parent is the request's own span.
        self.parent_id = parent_id


class Trace:
    """The trace context of one request. `parent_id` is "" at a root; `state` is the caller's tracestate.

    `leader` is the request that this one joined, if any: it waited for that one's answer.
    """

    def __init__(self, trace_id: str, parent_id: str, sampled: bool) -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.sampled = sampled
        self.span_id = ""
        self.state = ""
        self.stages: list[Stage] = []
        self.leader: Trace | None = None

    def child(self) -> Trace:
        """Returns a trace for a part of the request that has parts itself: its spans get its `span_id` as parent."""
        child = Trace(self.trace_id, self.span_id, self.sampled)
        child.span_id = new_span_id()
        child.stages = self.stages
        return child

    def context(self) -> tuple[str, str]:
        """Returns the ids of the trace and of the request's own span, for links from other spans."""
        self.span_id = self.span_id or new_span_id()
        return self.trace_id, self.span_id

    def span(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        content: Attributes | SpanContent,
        span_id: str = "",
        *,
        kind: Kind = Kind.INTERNAL,
        error: str = "",
        worker: str = "",
        worker_type: str = "",
        result: inference_pb2.WorkResult | None = None,
    ) -> None:
        """Records a child span; times in ns since the Unix epoch. `content` is read only if the trace is retained."""
        self.stages.append(
            Stage(name, start_ns, end_ns, content, span_id, kind, error, worker, worker_type, result, self.span_id)
        )

    def traceparent(self, span_id: str) -> str:
        return w3c.traceparent(self.trace_id, span_id, self.sampled)


def untraced() -> Trace:
    return Trace("0" * 31 + "1", "", False)


class Tracer:
    """Starts traces and exports retained ones.

    `ratio` is the share sampled if the caller does not decide; `ratios` has the ratios of models with their own.
    """

    def __init__(self, process: Process, ratio: float, queues: Sequence[SpanQueue[Any]]) -> None:
        self.ratio = ratio
        self.ratios: dict[str, float] = {}
        self.process = process
        self._queues = queues

    def start(self, traceparent: str | None) -> Trace:
        """Continues the caller's trace and respects its sampled flag; otherwise begins one."""
        if traceparent is not None and (parent := w3c.parse_traceparent(traceparent)) is not None:
            return Trace(*parent)
        return Trace(new_trace_id(), "", random.random() < self.ratio)

    def sample(self, trace: Trace, model: str) -> None:
        """Decides sampling by the model's own ratio, once the model is known, unless the caller decided."""
        ratio = self.ratios.get(model)
        if ratio is not None and not trace.parent_id:
            trace.sampled = int(trace.trace_id[-8:], 16) < ratio * (1 << 32)

    def finish(
        self,
        trace: Trace,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        error: str = "",
        timing: inference_pb2.Timing | None = None,
        shared: SharedAttributes | None = None,
    ) -> None:
        """Exports the request's own span with its children. `error` is the failure's message, "" on success.

        The own span has the attributes `shared` and `attributes`. `timing` describes work that this process ran itself.
        If no destination has room, no spans are built, so that a burst of failures stays cheap.
        """
        ready = []
        for queue in self._queues:
            if queue.has_room:
                ready.append(queue)
            else:
                queue.dropped += 1 + len(trace.stages)
        if ready:
            trace_id, own_id = trace.context()
            links = (trace.leader.context(),) if trace.leader is not None else ()
            root = Span(
                self.process, trace_id, own_id, trace.parent_id, name, Kind.SERVER, start_ns, end_ns, attributes, error,
                trace.state, (), links, shared,
            )  # fmt: skip
            spans = [root, *_children(trace, root, timing)] if trace.stages or timing is not None else [root]
            for queue in ready:
                queue.put(spans)

    def samples(self) -> Iterator[Sample]:
        for queue in self._queues:
            yield Sample(SPANS, (queue.destination.name, "sent"), queue.sent)
            yield Sample(SPANS, (queue.destination.name, "dropped"), queue.dropped)

    async def close(self) -> None:
        for queue in self._queues:
            await queue.close()


def _children(trace: Trace, root: Span, timing: inference_pb2.Timing | None) -> Iterator[Span]:
    if timing is not None:
        yield from run_spans(root.trace_id, root.span_id, root.process, timing)
    for stage in trace.stages:
        span_id = stage.span_id or new_span_id()
        content = stage.content
        shown, events = (content, ()) if isinstance(content, Mapping) else (content.attributes(), content.events())
        span = Span(
            root.process, root.trace_id, span_id, stage.parent_id or root.span_id, stage.name, stage.kind,
            stage.start_ns, stage.end_ns, shown, stage.error, trace.state, events,
        )  # fmt: skip
        yield span
        if stage.result is not None:
            yield from worker_spans(span, Process("worker", stage.worker), stage.result)
