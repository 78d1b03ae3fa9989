"""What one model version has done since it was loaded, as ModelStatistics tells it."""

from __future__ import annotations

import time

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.batcher import BatchResult
from services.runtime.metrics import Histogram


class Statistics:
    """Counts and cumulative times of a model version."""

    def __init__(self, name: str, version: str) -> None:
        self._message = v2.ModelStatistics(name=name, version=version)
        self._batches: dict[int, v2.InferBatchStatistics] = {}
        self.stages = {stage: Histogram() for stage in ("queue", "input", "compute", "output")}

    def succeeded(self, batch: BatchResult, rows: int, total_ns: int, output_ns: int) -> None:
        """One request was answered; `output_ns` from the end of its run to the finished response."""
        message = self._message
        stats = message.inference_stats
        input_ns, infer_ns = batch.run_ns - batch.start_ns, batch.end_ns - batch.run_ns
        message.last_inference = time.time_ns() // 1_000_000
        message.inference_count += rows
        queue_ns = batch.start_ns - batch.queued_ns
        for duration, ns in (
            (stats.success, total_ns),
            (stats.queue, queue_ns),
            (stats.compute_input, input_ns),
            (stats.compute_infer, infer_ns),
            (stats.compute_output, output_ns),
        ):
            duration.count += 1
            duration.ns += ns
        for stage, ns in zip(self.stages.values(), (queue_ns, input_ns, infer_ns, output_ns), strict=True):
            stage.observe(ns)
        if not batch.first:
            return
        message.execution_count += 1
        size = self._batches.get(batch.batch_rows)
        if size is None:
            size = self._batches[batch.batch_rows] = message.batch_stats.add(batch_size=batch.batch_rows)
        for duration, ns in (
            (size.compute_input, input_ns),
            (size.compute_infer, infer_ns),
            (size.compute_output, output_ns),
        ):
            duration.count += 1
            duration.ns += ns

    def failed(self, total_ns: int) -> None:
        """One request was not answered."""
        self._message.inference_stats.fail.count += 1
        self._message.inference_stats.fail.ns += total_ns

    def message(self) -> v2.ModelStatistics:
        """As it is now; not a copy."""
        return self._message
