"""The names of Ringmesh's spans and attributes that the console uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.proto.trace.v1 import trace_pb2

from services.runtime.telemetry.span_tree import StoredSpan

SHARED = "cache.shared"
EXECUTE = "Execute"
QUEUE = "queue"
BATCH = "batch"
RUN = "onnxruntime run"
STEP = "ensemble step"
CANDIDATE = "ringmesh.candidate"

MODEL = "ringmesh.model.name"
VERSION = "ringmesh.model.version"
TENANT = "ringmesh.tenant"
OUTCOME = "ringmesh.cache.outcome"
KEY = "ringmesh.key"
HIT = "ringmesh.cache.hit"
REASON = "ringmesh.cache.reason"
WORKER = "ringmesh.worker.id"
RANK = "ringmesh.rank"
TAKEN = "ringmesh.taken"
WHY = "ringmesh.reason"
JOINED = "ringmesh.joined"
BATCH_REQUESTS = "ringmesh.batch.requests"
BATCH_ROWS = "ringmesh.batch.rows"
PROVIDER = "ringmesh.provider"
CODE = "rpc.response.status_code"

_SUMMARY = {
    "model": MODEL,
    "version": VERSION,
    "tenant": TENANT,
    "cache": OUTCOME,
    "worker": WORKER,
    "key": KEY,
    "code": CODE,
}


def is_attempt(span: StoredSpan) -> bool:
    """Whether this is the router's span of a request that it sent to a worker."""
    return span.short_name == EXECUTE and span.service == "ringmesh-router"


def is_entry(service: str, span: trace_pb2.Span) -> bool:
    """Whether this is the router's server span, whose attributes match what the caller saw."""
    return service == "ringmesh-router" and span.kind == trace_pb2.Span.SPAN_KIND_SERVER


def summary(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Returns the attributes that describe the trace as a whole, by field of `TraceSummary`."""
    return {part: str(attributes[name]) for part, name in _SUMMARY.items() if attributes.get(name)}
