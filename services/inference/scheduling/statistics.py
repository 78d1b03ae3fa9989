"""The statistics of one model version since it was loaded, as ModelStatistics reports them."""

from __future__ import annotations  # compiled by mypyc

import threading
import time

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.scheduling.batcher import BatchResult
from services.runtime.telemetry.metrics import Histogram


class _Duration:
    """A count of events and their total duration."""

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, ns: int, times: int = 1) -> None:
        self.count += times
        self.ns += ns * times

    def message(self) -> v2.StatisticDuration:
        return v2.StatisticDuration(count=self.count, ns=self.ns)


class _Runs:
    """The batches of one size."""

    def __init__(self) -> None:
        self.input, self.infer, self.output = _Duration(), _Duration(), _Duration()


class Statistics:
    """Counts and cumulative times of a model version. May be updated from any thread.

    They are plain ints; `message` builds a message on request.
    """

    def __init__(self, name: str, version: str) -> None:
        self._name, self._version = name, version
        self._last_ns = self._rows = self._executions = 0
        self._success, self._fail, self._queue = _Duration(), _Duration(), _Duration()
        self._input, self._infer, self._output = _Duration(), _Duration(), _Duration()
        self._batches: dict[int, _Runs] = {}
        # Counts, by the kind of the error.
        self.errors: dict[str, int] = {}
        # Requests withdrawn before they ran.
        self.withdrawn = 0
        self.stages = {stage: Histogram() for stage in ("queue", "input", "compute", "output")}
        self._lock = threading.Lock()
        self._observe = tuple([histogram.observe for histogram in self.stages.values()])

    def succeeded(self, batch: BatchResult, rows: int, total_ns: int, output_ns: int, requests: int = 1) -> None:
        """Counts `requests` with `rows` in total that one run answered. The times hold for each request.

        `output_ns`: from the end of the run to the response.
        """
        queue_ns = batch.start_ns - batch.queued_ns
        input_ns, infer_ns = batch.run_ns - batch.start_ns, batch.end_ns - batch.run_ns
        with self._lock:
            self._rows += rows
            self._last_ns = time.time_ns()
            self._success.add(total_ns, requests)
            self._queue.add(queue_ns, requests)
            self._input.add(input_ns, requests)
            self._infer.add(infer_ns, requests)
            self._output.add(output_ns, requests)
            for observe, ns in zip(self._observe, (queue_ns, input_ns, infer_ns, output_ns), strict=True):
                observe(ns, requests)
            if not batch.first:
                return
            self._executions += 1
            runs = self._batches.get(batch.batch_rows)
            if runs is None:
                runs = self._batches[batch.batch_rows] = _Runs()
            runs.input.add(input_ns)
            runs.infer.add(infer_ns)
            runs.output.add(output_ns)

    def failed(self, total_ns: int, kind: str) -> None:
        with self._lock:
            self._fail.add(total_ns)
            self.errors[kind] = self.errors.get(kind, 0) + 1

    def message(self) -> v2.ModelStatistics:
        return v2.ModelStatistics(
            name=self._name,
            version=self._version,
            last_inference=self._last_ns // 1_000_000,
            inference_count=self._rows,
            execution_count=self._executions,
            inference_stats=v2.InferStatistics(
                success=self._success.message(),
                fail=self._fail.message(),
                queue=self._queue.message(),
                compute_input=self._input.message(),
                compute_infer=self._infer.message(),
                compute_output=self._output.message(),
            ),
            batch_stats=[
                v2.InferBatchStatistics(
                    batch_size=size,
                    compute_input=runs.input.message(),
                    compute_infer=runs.infer.message(),
                    compute_output=runs.output.message(),
                )
                for size, runs in self._batches.items()
            ],
        )
