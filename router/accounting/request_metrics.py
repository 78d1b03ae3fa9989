"""Metrics of the requests that this router answered: counts, durations, outcomes and compute time."""

from __future__ import annotations  # compiled by mypyc

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from ringmesh.cache.v1 import cache_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.telemetry import triton_metrics
from services.runtime.telemetry.load_report import Answers
from services.runtime.telemetry.metrics import BOUNDS_NS, OTHER, Exemplar, Family, Histogram, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

REQUESTS = Family(
    "ringmesh_requests_total",
    "counter",
    "inference requests; outcome: where the answer came from, error, or refused by a limit of its caller",
    ("method", "model", "version", "tenant", "code", "outcome"),
)
DURATION = Family(
    "ringmesh_request_duration_seconds",
    "histogram",
    "time from a request's arrival to its answer",
    ("model", "version", "outcome"),
)
ERRORS = Family(
    "ringmesh_errors_total",
    "counter",
    "requests that failed; type: invalid_input, unauthenticated, denied, unknown_model, not_loaded, precondition, "
    "not_cached, overload, quota, budget, memory, too_large, no_worker, worker_lost, unavailable, deadline, cancelled, "
    "execution, internal, redis, unimplemented",
    ("model", "version", "type"),
)
COMPUTE = Family(
    "ringmesh_compute_seconds_total",
    "counter",
    "compute time of answers: spent on misses and bypasses, saved by hits and joined requests",
    ("model", "version", "tenant", "outcome"),
)
IN_FLIGHT = Family("ringmesh_requests_in_flight", "gauge", "requests in progress that the local tier did not answer")

_MARK_SECONDS = 5.0
_RECENT = 2048
_MIN_REQUESTS = 100
# Of a model, between two updates of the thresholds. A trace costs as much as several hits, so retaining each would slow
# a busy router, above all when every request becomes slower.
_MOST_SLOW = 50
_NEVER = 1 << 62
_MAX_SERIES = 5000
_MAX_MODELS = 200
_MAX_TENANTS = 100
_HITS = frozenset({"hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined"})
_SERVERS_FAULTS = frozenset({"DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN"})
OK = "OK"
# Outcomes of requests that are not answered: for what the caller may not, and all others.
REFUSED, ERROR = "refused", "error"
# Kinds of errors that are the caller's, though their code is one of the servers' faults.
_LIMITS_OF_CALLERS = frozenset({"quota", "bytes", "concurrency", "budget", "too_large"})
# The method of internal requests, such as the steps of an ensemble.
STEP = "step"
_BAD_FOR_SLO = _SERVERS_FAULTS | {"DATA_LOSS", "UNIMPLEMENTED"}


# The values of Labels.
LabelValues: TypeAlias = tuple[str, str, str, str, str, str]


class Labels(NamedTuple):
    """The labels of one series. `outcome` is ERROR or REFUSED if `code` is not OK."""

    method: str
    model: str
    version: str
    tenant: str
    code: str
    outcome: str


def outcome_of(kind: str) -> str:
    """Of a request that failed with an error of `kind`."""
    return REFUSED if kind in _LIMITS_OF_CALLERS else ERROR


class Series(Histogram):
    """Counters of requests with equal labels. `recent` durations and the threshold `slow_ns` belong to their model."""

    def __init__(self, recent: deque[int], slow_ns: int) -> None:
        super().__init__()
        self.count = 0
        self.compute_us = 0
        self.recent = recent
        self.slow_ns = slow_ns
        # By index of the bucket.
        self.exemplars: dict[int, Exemplar] = {}


class RequestMetrics:
    """Counts requests by their labels; models and tenants beyond a bound count as `other`.

    A request is slow if it takes longer than the 99th percentile of its model's recent requests. `mark` updates that
    percentile. Between two updates, _MOST_SLOW requests of a model count as slow.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._series: dict[tuple[str, ...], Series] = {}
        self._models: set[tuple[str, str]] = set()
        self._tenants: set[str] = set()
        self._marks: dict[str, int] = {}
        self._recent: dict[str, deque[int]] = {}
        self._errors: dict[tuple[str, str, str], int] = {}
        # By model, since the last update.
        self._slow: dict[str, int] = {}

    def count(self, labels: LabelValues, ns: int, compute_us: int) -> bool:
        """Counts one request; `labels` as in Labels. Returns whether it was slow. Runs on every hit; takes 0.4 us."""
        series = self._series.get(labels)
        if series is None:
            series = self._open(Labels(*labels))
        series.count += 1
        series.sum_ns += ns
        series.compute_us += compute_us
        series.counts[bisect_left(BOUNDS_NS, ns)] += 1
        series.recent.append(ns)
        if ns <= series.slow_ns:
            return False
        slow = self._slow.get(labels[1], 0) + 1
        self._slow[labels[1]] = slow
        return slow <= _MOST_SLOW

    def failed(self, model: str, version: str, kind: str) -> None:
        """Counts the error `kind` of a request that is already counted."""
        error = (model, version, kind) if (model, version) in self._models else (OTHER, "", kind)
        self._errors[error] = self._errors.get(error, 0) + 1

    def exemplify(self, labels: LabelValues, ns: int, trace_id: str, end_ns: int) -> None:
        """Adds the retained trace of a counted request as an exemplar."""
        series = self._series.get(labels)
        if series is not None:
            series.exemplars[bisect_left(BOUNDS_NS, ns)] = Exemplar(trace_id, ns / 1e9, end_ns / 1e9)

    def start(self) -> None:
        """Updates the thresholds of slow requests every few seconds from now on."""
        BACKGROUND.every(_MARK_SECONDS, "request metrics", self.mark)

    def mark(self) -> None:
        for model, recent in list(self._recent.items()):
            # With fewer requests the percentile would just be the slowest of a handful.
            if len(recent) >= _MIN_REQUESTS:
                self._marks[model] = sorted(recent)[len(recent) * 99 // 100]
        self._slow = {}
        for labels, series in self._all():
            series.slow_ns = self._marks.get(labels.model, _NEVER)

    def add_to(self, statistics: v2.ModelStatistics) -> None:
        """Adds hits and misses as Triton counts them: a hit is a queued success, but no inference and no execution."""
        stats = statistics.inference_stats
        for labels, series in self._all():
            if (labels.model, labels.version, labels.code) != (statistics.name, statistics.version, OK):
                continue
            if labels.outcome in _HITS:
                for duration in (stats.success, stats.cache_hit):
                    duration.count += series.count
                    duration.ns += series.sum_ns
                stats.queue.count += series.count
            elif labels.outcome == "miss":
                stats.cache_miss.count += series.count
                stats.cache_miss.ns += series.sum_ns

    def triton_samples(self) -> Iterator[Sample]:
        """The hits and misses under Triton's names, for `Metrics.add`."""
        for name, version in sorted(self._models):
            statistics = v2.ModelStatistics(name=name, version=version)
            self.add_to(statistics)
            yield from triton_metrics.cached(statistics)

    def answers(self) -> Answers:
        """The number of all requests, and of those that failed with a server error."""
        counts = [(labels, series.count) for labels, series in self._all()]
        failed = (count for labels, count in counts if labels.code in _SERVERS_FAULTS and labels.outcome != REFUSED)
        return Answers(sum(count for _, count in counts), sum(failed))

    def usages(self) -> list[cache_pb2.UsageStats]:
        """Usage for the cache statistics: by model, tenant and the tier of the answer."""
        sums: dict[tuple[str, str, str], cache_pb2.UsageStats] = {}
        for labels, series in self._all():
            if labels.outcome not in _HITS and labels.outcome != "miss":
                continue
            tier = labels.outcome.removeprefix("hit-").removeprefix("miss")
            usage = sums.setdefault(
                (labels.model, labels.tenant, tier),
                cache_pb2.UsageStats(model=labels.model, tenant=labels.tenant, tier=tier),
            )
            if tier:
                usage.hits += series.count
                usage.saved_compute_us += series.compute_us
            else:
                usage.misses += series.count
        return list(sums.values())

    def samples(self) -> Iterator[Sample]:
        durations: dict[tuple[str, ...], Histogram] = {}
        exemplars: dict[tuple[str, ...], dict[int, Exemplar]] = {}
        for labels, series in self._all():
            yield Sample(REQUESTS, labels, series.count)
            by_model = (labels.model, labels.version, labels.outcome)
            total = durations.setdefault(by_model, Histogram())
            total.counts = [a + b for a, b in zip(total.counts, series.counts, strict=True)]
            total.sum_ns += series.sum_ns
            shown = exemplars.setdefault(by_model, {})
            for bucket, exemplar in series.exemplars.items():
                if bucket not in shown or shown[bucket].at < exemplar.at:
                    shown[bucket] = exemplar
        for key, histogram in durations.items():
            shown = exemplars[key]
            kept = tuple(shown.get(bucket) for bucket in range(len(histogram.counts)))
            yield Sample(DURATION, key, histogram.buckets()._replace(exemplars=kept))
        for group, us in self.compute_us().items():
            yield Sample(COMPUTE, group, us / 1e6)
        for error, count in self._errors.items():
            yield Sample(ERRORS, error, count)
        yield Sample(IN_FLIGHT, (), self.in_flight)

    def compute_us(self) -> dict[tuple[str, str, str, str], int]:
        """Compute time of successful requests, by model, version, tenant and outcome."""
        totals: dict[tuple[str, str, str, str], int] = {}
        for labels, series in self._all():
            if labels.code == OK:
                group = (labels.model, labels.version, labels.tenant, labels.outcome)
                totals[group] = totals.get(group, 0) + series.compute_us
        return totals

    def totals(self, seconds: float) -> tuple[int, int, int, int]:
        """Counts of callers' requests: all, failed by a server error, answered, and answered later than `seconds`.

        `seconds` is rounded up to the next bucket bound.
        """
        beyond = bisect_left(BOUNDS_NS, int(seconds * 1e9)) + 1
        total = failed = answered = slow = 0
        for labels, series in self._all():
            if labels.method == STEP:
                continue
            total += series.count
            if labels.code == OK:
                answered += series.count
                slow += sum(series.counts[beyond:])
            elif labels.code in _BAD_FOR_SLO and labels.outcome != REFUSED:
                failed += series.count
        return total, failed, answered, slow

    def _all(self) -> list[tuple[Labels, Series]]:
        return [(Labels(*key), series) for key, series in self._series.items()]

    def _open(self, labels: Labels) -> Series:
        if labels.model != OTHER and (labels.model, labels.version) not in self._models:
            if len(self._models) < _MAX_MODELS:
                self._models.add((labels.model, labels.version))
            else:
                labels = labels._replace(model=OTHER, version="")
        if labels.tenant not in self._tenants:
            if len(self._tenants) < _MAX_TENANTS:
                self._tenants.add(labels.tenant)
            else:
                labels = labels._replace(tenant=OTHER)
        if len(self._series) >= _MAX_SERIES:
            labels = labels._replace(tenant=OTHER)
        recent = self._recent.setdefault(labels.model, deque(maxlen=_RECENT))
        return self._series.setdefault(labels, Series(recent, self._marks.get(labels.model, _NEVER)))
