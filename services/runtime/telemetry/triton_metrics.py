"""Metrics of models under the names and in the units of Triton, for dashboards and alerts made for Triton.

Workers report the requests that they computed, routers those that a cache answered. The sum over all processes is what
Triton reports, where a cached request is a success without an execution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.telemetry.metrics import Family, Sample

_REASONS = {"overload": "REJECTED", "deadline": "REJECTED", "cancelled": "CANCELED", "execution": "BACKEND"}


def _counter(name: str, meaning: str, *labels: str) -> Family:
    return Family(f"nv_{name}", "counter", meaning, ("model", "version", *labels))


_FAMILIES = {
    family.name: family
    for family in (
        _counter("inference_request_success", "requests answered, from a cache too"),
        _counter("inference_request_failure", "requests that failed", "reason"),
        _counter("inference_count", "rows computed"),
        _counter("inference_exec_count", "batches computed"),
        _counter("inference_request_duration_us", "time of the answered requests"),
        _counter("inference_queue_duration_us", "time of the computed requests in the queue"),
        _counter("inference_compute_input_duration_us", "time of the computed requests before the model ran"),
        _counter("inference_compute_infer_duration_us", "time of the computed requests while the model ran"),
        _counter("inference_compute_output_duration_us", "time of the computed requests after the model ran"),
        _counter("cache_num_hits_per_model", "requests answered from a cache"),
        _counter("cache_num_misses_per_model", "requests that no cache could answer"),
        _counter("cache_hit_duration_per_model", "time of the requests answered from a cache, in microseconds"),
        _counter("cache_miss_duration_per_model", "time of the requests that no cache could answer, in microseconds"),
        Family("nv_inference_pending_request_count", "gauge", "requests in the queue", ("model", "version")),
    )
}


def computed(statistics: v2.ModelStatistics, errors: Mapping[str, int], pending: int) -> Iterator[Sample]:
    """The metrics of a model on a worker. `errors`: failed requests by the kind of the error."""
    model, stats = (statistics.name, statistics.version), statistics.inference_stats
    reasons = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
    for kind, count in errors.items():
        reasons[_REASONS.get(kind, "OTHER")] += count
    for reason, count in reasons.items():
        yield Sample(_FAMILIES["nv_inference_request_failure"], (*model, reason), count)
    yield from _samples(
        model,
        inference_request_success=stats.success.count,
        inference_count=statistics.inference_count,
        inference_exec_count=statistics.execution_count,
        inference_request_duration_us=stats.success.ns // 1000,
        inference_queue_duration_us=stats.queue.ns // 1000,
        inference_compute_input_duration_us=stats.compute_input.ns // 1000,
        inference_compute_infer_duration_us=stats.compute_infer.ns // 1000,
        inference_compute_output_duration_us=stats.compute_output.ns // 1000,
        inference_pending_request_count=pending,
    )


def cached(statistics: v2.ModelStatistics) -> Iterator[Sample]:
    """The metrics of a model on a router, from the statistics of its own hits and misses."""
    stats = statistics.inference_stats
    yield from _samples(
        (statistics.name, statistics.version),
        inference_request_success=stats.cache_hit.count,
        inference_request_duration_us=stats.cache_hit.ns // 1000,
        cache_num_hits_per_model=stats.cache_hit.count,
        cache_num_misses_per_model=stats.cache_miss.count,
        cache_hit_duration_per_model=stats.cache_hit.ns // 1000,
        cache_miss_duration_per_model=stats.cache_miss.ns // 1000,
    )


def _samples(model: tuple[str, str], **values: int) -> Iterator[Sample]:
    return (Sample(_FAMILIES[f"nv_{name}"], model, value) for name, value in values.items())
