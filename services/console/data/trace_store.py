"""Recent traces in memory, bounded in bytes and number. Failed traces are retained longest."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from opentelemetry.proto.trace.v1 import trace_pb2

from services.console.data import span_names
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan, trees

# Memory overhead of a span and of a trace in bytes, measured with tracemalloc.
_SPAN_OVERHEAD = 160
_TRACE_OVERHEAD = 900
MAX_SPANS = 2000
# The largest share of the store that one trace can take.
MAX_SHARE = 1 / 16
# Maximum length of each searchable text of a trace, and of a service name, in characters.
LONGEST_TEXT = 512
_EXACT = ("model", "tenant", "cache", "worker", "key")


@dataclass(slots=True)
class TraceSummary:
    """The searchable fields of a trace. Times in ns; `error` is the router's message, else the first; "" if none."""

    trace_id: str
    start_ns: int = 0
    end_ns: int = 0
    name: str = ""
    model: str = ""
    version: str = ""
    tenant: str = ""
    cache: str = ""
    worker: str = ""
    code: str = ""
    error: str = ""
    key: str = ""
    spans: int = 0

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(slots=True)
class _StoredTrace:
    summary: TraceSummary
    size: int = _TRACE_OVERHEAD
    # The part of `size` that the texts of the summary take.
    text: int = 0
    # (service, serialized span) by span id, because an exporter can send a span twice when it retries.
    spans: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceQuery:
    """A search. "" and 0 match everything. `status` is "ok" or "error"; times are in ms."""

    model: str = ""
    tenant: str = ""
    cache: str = ""
    status: str = ""
    worker: str = ""
    key: str = ""
    text: str = ""
    min_ms: float = 0
    max_ms: float = 0

    def matches(self, found: TraceSummary) -> bool:
        took = found.duration_ns / 1e6
        text = self.text.lower()
        return (
            all(getattr(self, part) in ("", getattr(found, part)) for part in _EXACT)
            and (not self.status or self.status == ("error" if found.error else "ok"))
            and (not self.min_ms or took >= self.min_ms)
            and (not self.max_ms or took <= self.max_ms)
            and (found.trace_id.startswith(text) or text in f"{found.name} {found.code} {found.error}".lower())
        )


class TraceStore:
    """Stores OTLP spans as traces. Holds at most `max_bytes` and `max_traces`, and evicts the oldest traces first.

    Failed traces outlive newer successful ones, in up to half of the store. A trace takes at most MAX_SPANS spans and
    MAX_SHARE of the store; further spans of it are dropped.
    """

    def __init__(self, *, max_bytes: int, max_traces: int) -> None:
        self.bytes = 0
        self.evicted = 0
        self.dropped_spans = 0
        self.received_spans = 0
        self._max_bytes = max_bytes
        self._max_traces = max_traces
        self._plain: OrderedDict[str, _StoredTrace] = OrderedDict()
        self._failed: OrderedDict[str, _StoredTrace] = OrderedDict()
        self._failed_bytes = 0

    def __len__(self) -> int:
        return len(self._plain) + len(self._failed)

    def add(self, service: str, span: trace_pb2.Span) -> bool:
        """Adds a span. Returns False if it was dropped because its trace is full. Raises ValueError for invalid ids."""
        if len(span.trace_id) != 16 or len(span.span_id) != 8 or not any(span.trace_id):
            raise ValueError("a span must have a trace id of 16 bytes and a span id of 8")
        self.received_spans += 1
        trace_id = span.trace_id.hex()
        kept = self._failed.get(trace_id) or self._plain.get(trace_id) or _StoredTrace(TraceSummary(trace_id))
        if span.span_id in kept.spans:
            return True
        service = service[:LONGEST_TEXT]
        size = span.ByteSize() + len(service) + _SPAN_OVERHEAD
        if len(kept.spans) == MAX_SPANS or kept.size + size > self._max_bytes * MAX_SHARE:
            self.dropped_spans += 1
            return False
        if not kept.spans:
            self._plain[trace_id] = kept
            self.bytes += kept.size
        kept.spans[span.span_id] = (service, span.SerializeToString())
        _summarize(kept.summary, service, span)
        text = _text_bytes(kept.summary)
        size += text - kept.text
        kept.text = text
        kept.size += size
        self.bytes += size
        if trace_id in self._failed:
            self._failed_bytes += size
        elif kept.summary.error:
            self._failed[trace_id] = self._plain.pop(trace_id)
            self._failed_bytes += kept.size
        self._evict()
        return True

    def find(self, trace_id: str) -> tuple[TraceSummary, SpanTree] | None:
        """Returns the trace with all spans received so far; None if it is not stored."""
        kept = self._failed.get(trace_id) or self._plain.get(trace_id)
        if kept is None:
            return None
        spans = [as_span(service, trace_pb2.Span.FromString(data)) for service, data in kept.spans.values()]
        return kept.summary, trees(spans)[0]

    def last_failures(self) -> dict[tuple[str, str], TraceSummary]:
        """Returns the newest failed trace of each model and code."""
        newest: dict[tuple[str, str], TraceSummary] = {}
        for kept in self._failed.values():
            found = kept.summary
            known = newest.get((found.model, found.code))
            if known is None or known.start_ns < found.start_ns:
                newest[found.model, found.code] = found
        return newest

    def summaries(self) -> Iterator[TraceSummary]:
        """Yields the summaries of all traces, in no particular order."""
        for part in (self._plain, self._failed):
            for kept in part.values():
                yield kept.summary

    def _evict(self) -> None:
        while len(self) > 1 and (self.bytes > self._max_bytes or len(self) > self._max_traces):
            crowded = (
                self._failed_bytes > self._max_bytes // 2
                or len(self._failed) > self._max_traces // 2
                or not self._plain
            )
            part = self._failed if crowded else self._plain
            _, oldest = part.popitem(last=False)
            self.bytes -= oldest.size
            if crowded:
                self._failed_bytes -= oldest.size
            self.evicted += 1


def as_span(service: str, span: trace_pb2.Span) -> StoredSpan:
    """Converts an OTLP span to the format of `ringmesh trace`."""
    return StoredSpan(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        service,
        span.name,
        span.start_time_unix_nano,
        max(span.start_time_unix_nano, span.end_time_unix_nano),
        _error(span),
        _attributes(span),
        events=tuple({"name": event.name, "attributes": _attributes(event)} for event in span.events),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
    )


def _attributes(of: trace_pb2.Span | trace_pb2.Span.Event) -> dict[str, Any]:
    return {attribute.key: _plain(attribute.value) for attribute in of.attributes}


def _error(span: trace_pb2.Span) -> str:
    if span.status.code != trace_pb2.Status.STATUS_CODE_ERROR:
        return ""
    return span.status.message or "failed"


def _plain(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]  # type: ignore[attr-defined]
    return getattr(value, kind) if kind in ("string_value", "bool_value", "int_value", "double_value") else ""


def _summarize(summary: TraceSummary, service: str, span: trace_pb2.Span) -> None:
    summary.spans += 1
    start, end = span.start_time_unix_nano, max(span.start_time_unix_nano, span.end_time_unix_nano)
    if not summary.start_ns or start < summary.start_ns:
        summary.start_ns = start
        summary.name = span.name.rpartition("/")[2][:LONGEST_TEXT]
    summary.end_ns = max(summary.end_ns, end)
    attributes = _attributes(span)
    is_entry = span_names.is_entry(service, span)
    if error := _error(span):
        # The router's message is the one that the caller received.
        summary.error = error[:LONGEST_TEXT] if is_entry or not summary.error else summary.error
    for part, value in span_names.summary(attributes).items():
        if is_entry or not getattr(summary, part):
            setattr(summary, part, value[:LONGEST_TEXT])


def _text_bytes(summary: TraceSummary) -> int:
    """Returns the memory of the summary's texts. _TRACE_OVERHEAD includes the trace id and empty texts."""
    return sum(sys.getsizeof(text) for part in _TEXTS if (text := getattr(summary, part)))


_TEXTS = tuple(part.name for part in fields(TraceSummary) if part.type == "str" and part.name != "trace_id")
