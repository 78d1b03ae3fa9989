"""Counts what requests used, for the ledger: a record for each computed, failed or traced one, hits folded."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Iterable
from typing import Final, TypeAlias

from cache.tiers.entry import Entry
from router.accounting.budgets import Budgets
from router.accounting.key_samples import KeySamples
from router.accounting.request_metrics import LabelValues
from services.runtime.telemetry.tracing import Trace

# Labels and worker type, then COLUMNS of a batch, and the trace id.
Record: TypeAlias = tuple[LabelValues, str, int, int, int, int, int, int, int, int, int, int, int, int, int, int, bytes]

# Worker types.
CPU: Final = "cpu"
GPU: Final = "gpu"
# The worker type of routers, whose time is priced too.
ROUTER: Final = "router"
# Tenants beyond the bound are counted under this name.
OTHER_TENANTS: Final = "(other)"
_DAY_NS: Final = 86_400 * 10**9
_CPU = frozenset({"CPUExecutionProvider", "OpenVINOExecutionProvider", "ensemble", ""})
COMPUTED = frozenset({"miss", "bypass"})


class Fold:
    """Hits with equal labels: the number of requests, and sums of what they used and saved."""

    __slots__ = (
        "cache_ns",
        "compute_us",
        "request_bytes",
        "requests",
        "response_bytes",
        "router_ns",
        "saved_us",
        "total_ns",
        "worker_type",
    )

    def __init__(self, worker_type: str) -> None:
        self.worker_type = worker_type
        self.requests = self.total_ns = self.router_ns = self.cache_ns = 0
        self.compute_us = self.saved_us = self.request_bytes = self.response_bytes = 0

    def record(self, labels: LabelValues, at_ms: int) -> Record:
        """The record that stands for them, of the time `at_ms`."""
        return (
            labels, self.worker_type, at_ms, self.requests, self.total_ns // 1000, self.router_ns // 1000,
            self.cache_ns // 1000, 0, 0, self.compute_us, self.saved_us, 0, 0, 0, self.request_bytes,
            self.response_bytes, b"",
        )  # fmt: skip


class Meter:
    """Collects records until `take`. Charges `budgets`.

    Callers may invent tenants: the first `most_tenants` of a UTC day, and those that have a budget, keep their names.

    A hit takes 0.25 us, of a sampled key 0.5 us, any other request 1.5 us (compiled).
    """

    def __init__(self, budgets: Budgets, most_tenants: int) -> None:
        self._budgets = budgets
        self._records: list[Record] = []
        self._folds: dict[LabelValues, Fold] = {}
        self.samples = KeySamples()
        self._most_tenants = most_tenants
        self._tenants: set[str] = set()
        self._day = 0
        # Requests of tenants that were counted as OTHER_TENANTS.
        self.unnamed = 0

    def answered(
        self,
        labels: LabelValues,
        trace: Trace,
        worker_type: str,
        entry: Entry,
        start_ns: int,
        end_ns: int,
        router_ns: int,
        request_bytes: int,
        key: bytes,
        *,
        alone: bool,
    ) -> None:
        """Counts an answer. `alone`: it gets a record of its own even if it is a hit, because its trace is retained.

        `worker_type`: of the workers that hold the model, which prices what a hit saved. `router_ns`: the time before
        the request waited; 0: it never did. `key`: a hash of the request, or empty.
        """
        outcome = labels[5]
        if key and key[0] < self.samples.below:
            model, version, at_ms = labels[1], labels[2], end_ns // 1_000_000
            self.samples.add(model, version, worker_type, key, entry, at_ms, cacheable=outcome != "bypass")
        computed = outcome in COMPUTED
        if computed or alone:
            saved_us = 0 if computed else entry.compute_us
            self._add(
                labels, trace, worker_type, start_ns, end_ns, router_ns, saved_us, request_bytes, len(entry.value)
            )
            return
        fold = self._folds.get(labels)
        if fold is None:
            labels = self._bounded(labels, end_ns)
            fold = self._folds.get(labels)
            if fold is None:
                fold = self._folds[labels] = Fold(worker_type)
        total_ns = elapsed(start_ns, end_ns)
        router_ns = max(0, router_ns) or total_ns
        compute_us = _compute_us(trace)  # of an embedding
        fold.requests += 1
        fold.total_ns += total_ns
        fold.router_ns += router_ns
        fold.saved_us += entry.compute_us
        fold.request_bytes += request_bytes
        fold.response_bytes += len(entry.value)
        fold.cache_ns += _cache_ns(trace)
        fold.compute_us += compute_us
        if self._budgets.limits:
            self._budgets.charge(labels[3], labels[1], fold.worker_type, compute_us, router_ns)

    def failed(
        self,
        labels: LabelValues,
        trace: Trace,
        worker_type: str,
        start_ns: int,
        end_ns: int,
        router_ns: int,
        request_bytes: int,
    ) -> None:
        """Counts a request that failed."""
        self._add(labels, trace, worker_type, start_ns, end_ns, router_ns, 0, request_bytes, 0)

    def computed_late(self, labels: LabelValues, trace: Trace, known_stages: int) -> None:
        """Counts what was computed for a request after it had failed; it was counted with `known_stages` stages."""
        late = Trace(trace.trace_id, "", False)
        late.stages = trace.stages[known_stages:]
        now = time.time_ns()
        self._add(labels, late, CPU, now, now, 0, 0, 0, 0, requests=0)

    def _add(
        self,
        labels: LabelValues,
        trace: Trace,
        worker_type: str,
        start_ns: int,
        end_ns: int,
        router_ns: int,
        saved_us: int,
        request_bytes: int,
        response_bytes: int,
        requests: int = 1,
    ) -> None:
        total_ns = elapsed(start_ns, end_ns)
        router_ns = max(0, router_ns) or total_ns
        cache_ns, kind = _cache_ns(trace), worker_type
        queue_us = run_us = compute_us = batch_requests = batch_rows = 0
        for stage in trace.stages:
            if stage.result is not None:
                timing = stage.result.timing
                queue_us += timing.queue_us
                run_us += timing.compute_us
                batch_requests, batch_rows = timing.batch_requests, timing.batch_rows
                if compute_us and stage.worker_type != kind:
                    # Steps of an ensemble ran on workers of several types, each at its own price.
                    self._charge(labels, kind, end_ns, compute_us)
                    compute_us = 0
                kind = stage.worker_type
                if not timing.joined:
                    compute_us += timing.share_us
        labels = self._bounded(labels, end_ns)
        self._records.append(
            (
                labels, kind, end_ns // 1_000_000, requests, total_ns // 1000, router_ns // 1000, cache_ns // 1000,
                queue_us, run_us, compute_us, saved_us, batch_requests, batch_rows, 0, request_bytes, response_bytes,
                bytes.fromhex(trace.trace_id),
            )
        )  # fmt: skip
        if self._budgets.limits:
            self._budgets.charge(labels[3], labels[1], kind, compute_us, router_ns)

    def _charge(self, labels: LabelValues, worker_type: str, end_ns: int, compute_us: int) -> None:
        """Adds what a request computed beside what its own record holds."""
        labels = self._bounded(labels, end_ns)
        at_ms = end_ns // 1_000_000
        self._records.append((labels, worker_type, at_ms, 0, 0, 0, 0, 0, 0, compute_us, 0, 0, 0, 0, 0, 0, b""))
        if self._budgets.limits:
            self._budgets.charge(labels[3], labels[1], worker_type, compute_us, 0)

    def _bounded(self, labels: LabelValues, now_ns: int) -> LabelValues:
        """The same, with OTHER_TENANTS in place of a tenant beyond the bound."""
        tenant, day = labels[3], now_ns // _DAY_NS
        if day != self._day:
            self._day, self._tenants = day, set()
        if tenant in self._tenants:
            return labels
        if len(self._tenants) < self._most_tenants or tenant in self._budgets.tenants:
            self._tenants.add(tenant)
            return labels
        self.unnamed += 1
        return labels[0], labels[1], labels[2], OTHER_TENANTS, labels[4], labels[5]

    def take(self) -> tuple[list[Record], dict[LabelValues, Fold]]:
        """What was counted since the last call."""
        taken = self._records, self._folds
        self._records, self._folds = [], {}
        return taken


def device_of(provider: str) -> str:
    """What the execution provider computes on."""
    return CPU if provider in _CPU else GPU


def type_of_worker(providers: Iterable[str]) -> str:
    """The type under which the ledger prices a worker whose models run with `providers`.

    One that runs a model on a GPU is paid for as such, whatever else it runs: all that it computes has that price.
    """
    return GPU if any(provider not in _CPU for provider in providers) else CPU


def elapsed(start_ns: int, end_ns: int) -> int:
    """The time between; 0 if the clock was set back meanwhile."""
    return max(0, end_ns - start_ns)


def _cache_ns(trace: Trace) -> int:
    """The time in look-ups outside the process."""
    total = 0
    for stage in trace.stages:
        if stage.result is None and stage.name[:6] == "cache.":
            total += elapsed(stage.start_ns, stage.end_ns)
    return total


def _compute_us(trace: Trace) -> int:
    """The shares of the runs in which the request was computed; nothing of runs that it joined."""
    total = 0
    for stage in trace.stages:
        if stage.result is not None and not stage.result.timing.joined:
            total += stage.result.timing.share_us
    return total
