"""Traces: W3C context in and out, spans built after the fact and only for sampled requests.

A request records plain timestamps; what is sampled becomes OpenTelemetry spans when it ends. Spans go
to an OTLP collector, to a folder that `ringmesh trace` reads, or both, through a bounded queue on a
thread of its own: a slow or dead collector costs spans, never requests.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

Attributes: TypeAlias = Mapping[str, str | int | float | bool]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_FILE_BYTES = 16 << 20


class Trace:
    """One request's place in its trace. `span_id` names the span of this process; `parent_id` is "" at a root."""

    __slots__ = ("_spans", "parent_id", "sampled", "span_id", "trace_id")

    def __init__(self, trace_id: str, parent_id: str, sampled: bool) -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.sampled = sampled
        self.span_id = new_span_id() if sampled else ""
        self._spans: list[tuple[str, str, int, int, Attributes]] = []

    def span(self, name: str, start_ns: int, end_ns: int, attributes: Attributes, span_id: str = "") -> None:
        """Records a child span (times since the Unix epoch); nothing where the request is not sampled."""
        if self.sampled:
            self._spans.append((span_id or new_span_id(), name, start_ns, end_ns, attributes))

    def traceparent(self, span_id: str) -> str:
        """What to send on, so that `span_id` becomes the parent there."""
        return f"00-{self.trace_id}-{span_id}-01"


def new_span_id() -> str:
    """16 hexadecimal digits, as W3C has them."""
    return f"{random.getrandbits(64) or 1:016x}"


class Tracer:
    """Starts traces and sends finished ones out. `ratio` is the share sampled where the caller does not say."""

    def __init__(self, service: str, ratio: float, exporters: Sequence[SpanExporter]) -> None:
        self.ratio = ratio
        self._resource = Resource.create({"service.name": f"ringmesh-{service}", "process.pid": os.getpid()})
        self._processors = [
            BatchSpanProcessor(exporter, max_queue_size=8192, schedule_delay_millis=500, max_export_batch_size=512)
            for exporter in exporters
        ]

    def start(self, traceparent: str | None) -> Trace:
        """Continues the caller's trace and respects its sampled flag; otherwise begins one."""
        if traceparent is not None and (match := _TRACEPARENT.fullmatch(traceparent)):
            trace_id, parent_id, flags = match.groups()
            if int(trace_id, 16) and int(parent_id, 16):
                return Trace(trace_id, parent_id, bool(int(flags, 16) & 1))
        return Trace(f"{random.getrandbits(128) or 1:032x}", "", random.random() < self.ratio)

    def finish(
        self, trace: Trace, name: str, start_ns: int, end_ns: int, attributes: Attributes, error: str = ""
    ) -> None:
        """Ends the request's own span, with its children. `error` is the failure's message, "" on success."""
        if not (trace.sampled and self._processors):
            return
        status = Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET)
        kind = SpanKind.SERVER
        self._export(trace.trace_id, trace.span_id, trace.parent_id, name, start_ns, end_ns, attributes, kind, status)
        for span_id, child, start, end, child_attributes in trace._spans:
            self._export(
                trace.trace_id, span_id, trace.span_id, child, start, end, child_attributes, SpanKind.INTERNAL, Status()
            )

    def close(self) -> None:
        """Sends what is queued; blocks for up to some seconds, so call it off the event loop."""
        for processor in self._processors:
            processor.shutdown()  # type: ignore[no-untyped-call]

    def _export(
        self,
        trace_id: str,
        span_id: str,
        parent_id: str,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        kind: SpanKind,
        status: Status,
    ) -> None:
        trace = int(trace_id, 16)
        span = ReadableSpan(
            name,
            context=SpanContext(trace, int(span_id, 16), is_remote=False, trace_flags=_SAMPLED),
            parent=SpanContext(trace, int(parent_id, 16), is_remote=True, trace_flags=_SAMPLED) if parent_id else None,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=status,
            start_time=start_ns,
            end_time=end_ns,
        )
        for processor in self._processors:
            processor.on_end(span)


class FolderExporter(SpanExporter):
    """Writes spans as JSON lines, one file a process, the file before it kept: at most 32 MB each."""

    def __init__(self, folder: Path, service: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{service}-{os.getpid()}.jsonl"

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """A full or missing disk loses these spans and nothing else."""
        lines = "".join(json.dumps(_as_dict(span), separators=(",", ":")) + "\n" for span in spans)
        try:
            if self._path.exists() and self._path.stat().st_size > _FILE_BYTES:
                self._path.replace(self._path.with_suffix(".1.jsonl"))
            with self._path.open("a") as file:
                file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def _as_dict(span: ReadableSpan) -> dict[str, object]:
    context = span.get_span_context()
    assert context is not None
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else "",
        "service": span.resource.attributes["service.name"],
        "name": span.name,
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "error": span.status.description or "",
        "attributes": dict(span.attributes or {}),
    }


def create_tracer(service: str, *, ratio: float, folder: Path | None, otlp_endpoint: str | None) -> Tracer:
    """A tracer with the exporters that are set; with none, context still passes through."""
    exporters: list[SpanExporter] = []
    if folder is not None:
        exporters.append(FolderExporter(folder, service))
    if otlp_endpoint is not None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        # The timeout holds up the end of the process where the collector is gone.
        insecure = otlp_endpoint.startswith("http://")
        exporters.append(OTLPSpanExporter(endpoint=otlp_endpoint, insecure=insecure, timeout=2))
    return Tracer(service, ratio, exporters)
