"""Metrics of the console's trace store."""

from __future__ import annotations

from collections.abc import Iterator

from services.console.data.trace_store import TraceStore
from services.runtime.telemetry.metrics import Family, Sample

TRACES = Family("ringmesh_console_traces", "gauge", "traces in memory")
TRACE_BYTES = Family("ringmesh_console_trace_bytes", "gauge", "memory of these traces")
SPANS = Family(
    "ringmesh_console_spans_total", "counter", "spans received, and spans dropped for lack of memory", ("result",)
)


def samples(store: TraceStore) -> Iterator[Sample]:
    yield Sample(TRACES, (), len(store))
    yield Sample(TRACE_BYTES, (), store.bytes)
    yield Sample(SPANS, ("received",), store.received_spans)
    yield Sample(SPANS, ("dropped",), store.dropped_spans)
