"""Metrics of attempts, retries and refusals."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterator

from services.runtime.telemetry.metrics import OTHER, Counter, Family, Histogram, Sample

ATTEMPTS = Family(
    "ringmesh_attempts_total",
    "counter",
    "requests sent to workers; kind: first, retry, hedge; code: of the answer, UNAVAILABLE if none came",
    ("worker", "kind", "code"),
)
ATTEMPT_SECONDS = Family(
    "ringmesh_attempt_duration_seconds", "histogram", "from sending a request to a worker to its answer", ("worker",)
)
RETRIES_DENIED = Family("ringmesh_retries_denied_total", "counter", "retries that the retry budget denied")
SHEDS = Family(
    "ringmesh_sheds_total", "counter", "requests refused; reason: overload, quota, bytes, concurrency", ("reason",)
)
_MAX_WORKERS = 200


class DispatchMetrics:
    """Counts attempts, by worker."""

    def __init__(self) -> None:
        self._attempts = Counter(ATTEMPTS)
        self._times: dict[str, Histogram] = {}

    def samples(self) -> Iterator[Sample]:
        yield from self._attempts.samples()
        for worker, times in self._times.items():
            yield Sample(ATTEMPT_SECONDS, (worker,), times.buckets())

    def attempted(self, worker: str, kind: str, code: str, ns: int) -> None:
        self._attempts.add(worker, kind, code)
        times = self._times.get(worker)
        if times is None:
            # Bounded, because new workers may have new names.
            worker = worker if len(self._times) < _MAX_WORKERS else OTHER
            times = self._times.setdefault(worker, Histogram())
        times.observe(ns)
