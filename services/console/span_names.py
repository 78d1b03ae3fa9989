"""The names of spans and attributes that Ringmesh's own processes use, as far as the console tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

BYPASS = "cache.bypass"
SHARED = "cache.shared"
FORWARD = "forward"
QUEUE = "queue"
BATCH = "batch"
RUN = "onnxruntime run"

MODEL = "ringmesh.model"
VERSION = "ringmesh.model.version"
TENANT = "ringmesh.tenant"
CACHE = "ringmesh.cache"
HIT = "ringmesh.cache.hit"
REASON = "ringmesh.reason"
WORKER = "ringmesh.worker"
RANK = "ringmesh.rank"
CANDIDATES = "ringmesh.candidates"
ERROR = "ringmesh.error"
BATCH_REQUESTS = "ringmesh.batch.requests"
BATCH_ROWS = "ringmesh.batch.rows"
PROVIDER = "ringmesh.provider"
CODE = "rpc.grpc.status_code"
KEPT = "ringmesh.kept"

_SUMMARY = {"model": MODEL, "version": VERSION, "tenant": TENANT, "cache": CACHE, "worker": WORKER, "kept": KEPT}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def is_entry(service: str, name: str) -> bool:
    """Whether the span is the router's own of a request: what it says is what the caller saw."""
    return service == "ringmesh-router" and name == "router ModelInfer"


def summary(attributes: Mapping[str, Any]) -> dict[str, str]:
    """What `attributes` say about the trace as a whole, by the fields of a trace's summary."""
    found = {part: str(attributes[name]) for part, name in _SUMMARY.items() if attributes.get(name)}
    if code := attributes.get(CODE):
        found["code"] = _CODES.get(code, str(code))
    return found
