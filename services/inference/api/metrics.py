"""The metrics of a worker's models. The counts are those of ModelStatistics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from services.inference.worker import Worker
from services.runtime.telemetry import triton_metrics
from services.runtime.telemetry.metrics import Buckets, Family, Sample

_MODEL = ("model", "version")
REQUESTS = Family(
    "ringmesh_worker_requests_total", "counter",
    "requests by result: ok, failed, withdrawn (a hedge that lost, before it ran)", (*_MODEL, "result"),
)  # fmt: skip
ERRORS = Family("ringmesh_worker_errors_total", "counter", "requests that failed, by type of error", (*_MODEL, "type"))
STAGE = Family(
    "ringmesh_worker_stage_seconds", "histogram", "time of requests by stage: queue, input, compute, output",
    (*_MODEL, "stage"),
)  # fmt: skip
BATCH_ROWS = Family(
    "ringmesh_worker_batch_rows", "histogram",
    "rows of the batches that ran; a run of a model that is not batched counts as one row", _MODEL,
)  # fmt: skip
QUEUED = Family("ringmesh_worker_queue_depth", "gauge", "requests that wait for a batch", _MODEL)
MEMORY = Family(
    "ringmesh_worker_model_bytes", "gauge",
    "memory of a model, with RINGMESH_MODEL_MEMORY_BYTES; 0 while it is not in memory", _MODEL,
)  # fmt: skip
LOADS = Family("ringmesh_worker_model_loads_total", "counter", "times a model was loaded", _MODEL)
LOADED = Family(
    "ringmesh_worker_model_info", "gauge", "always 1; a model that the worker holds, with its execution provider",
    (*_MODEL, "provider", "cacheable"),
)  # fmt: skip
DECISIONS = Family(
    "ringmesh_worker_decisions_bytes", "gauge", "disk used by loads and unloads by request, stored for restarts"
)
FORGOTTEN = Family(
    "ringmesh_worker_load_failures_forgotten_total",
    "counter",
    "failed loads that RepositoryIndex no longer lists, because its list is full",
)

_ROW_BOUNDS = tuple(float(1 << power) for power in range(11))


class WorkerMetrics:
    """Makes samples of the models that `worker` holds."""

    def __init__(self, worker: Worker, *, triton_names: bool = False) -> None:
        self._worker = worker
        self._triton_names = triton_names

    def samples(self) -> Iterator[Sample]:
        store = self._worker.store
        yield Sample(DECISIONS, (), store.decisions.size)
        yield Sample(FORGOTTEN, (), store.failures_dropped)
        for held in store.held:
            model = (held.model.name, str(held.model.version))
            message = held.statistics.message()
            stats = message.inference_stats
            cacheable = "true" if held.model.cacheable else "false"
            yield Sample(LOADED, (*model, held.model.provider, cacheable), 1)
            yield Sample(REQUESTS, (*model, "ok"), stats.success.count)
            yield Sample(REQUESTS, (*model, "failed"), stats.fail.count)
            yield Sample(REQUESTS, (*model, "withdrawn"), held.statistics.withdrawn)
            for kind, count in held.statistics.errors.items():
                yield Sample(ERRORS, (*model, kind), count)
            yield Sample(QUEUED, model, held.waiting)
            if self._triton_names:
                yield from triton_metrics.computed(message, held.statistics.errors, held.waiting)
            if held.resident is not None:
                yield Sample(MEMORY, model, held.resident.bytes if held.loaded else 0)
                yield Sample(LOADS, model, held.resident.loads)
            # Most of hundreds of models get no requests, and a histogram has 43 series.
            if not message.execution_count and not stats.fail.count:
                continue
            for stage, times in held.statistics.stages.items():
                yield Sample(STAGE, (*model, stage), times.buckets())
            counts, rows = [0] * (len(_ROW_BOUNDS) + 1), 0
            for batch in message.batch_stats:
                counts[bisect_left(_ROW_BOUNDS, batch.batch_size)] += batch.compute_infer.count
                rows += batch.batch_size * batch.compute_infer.count
            yield Sample(BATCH_ROWS, model, Buckets(_ROW_BOUNDS, counts, rows))
