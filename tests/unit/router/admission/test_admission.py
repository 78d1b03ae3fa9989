import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.caller import ANYBODY, Caller, Priority, RefusedError, caller_of
from router.admission.concurrency_limit import ConcurrencyLimit
from router.admission.quotas import Quotas
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.protocol import caller_metadata
from services.runtime.token_bucket import TokenBucket
from tests.unit.clock import Clock


class Worker:
    """A worker in simulated time that runs what waits in batches, and callers who come at a steady rate."""

    def __init__(self, target, *, batch, run):
        self.clock = Clock(1000.0)
        self.limit = ConcurrencyLimit(target, self.clock)
        self._batch, self._run = batch, run
        self._waiting, self._running, self._done_at = [], [], 0.0
        self.latencies, self.refused = [], 0

    def load(self, rate, seconds, priority=Priority.NORMAL):
        """Requests at `rate`; latencies of those answered are kept with when they came."""
        end = self.clock.now + seconds
        arrival = self.clock.now
        while arrival < end or self._running:
            if self._running and (self._done_at <= arrival or arrival >= end):
                self.clock.now = self._done_at
                self._finish()
                continue
            self.clock.now = arrival
            arrival += 1 / rate
            if self.limit.admits(priority):
                self._waiting.append((self.clock.now, self.limit.begin()))
                self._start()
            else:
                self.refused += 1

    def callers(self, count, seconds):
        """So many, each of whom asks again when it has its answer."""
        end = self.clock.now + seconds
        idle = count
        while self.clock.now < end:
            for _ in range(idle):
                if self.limit.admits(Priority.NORMAL):
                    self._waiting.append((self.clock.now, self.limit.begin()))
                else:
                    self.refused += 1
            self._start()
            if not self._running:
                break
            idle = len(self._running)
            self.clock.now = self._done_at
            self._finish()

    def _start(self):
        if self._waiting and not self._running:
            self._running, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            self._done_at = self.clock.now + self._run(len(self._running))

    def _finish(self):
        run = self._run(len(self._running))
        for came, begun in self._running:
            self.latencies.append((came, self.clock.now - came))
            self.limit.completed(begun, self.clock.now - came, run)
            self.limit.end()
        self._running = []
        self._start()


WORKERS = {
    "fast": (1, lambda n: 0.002),
    "slow": (1, lambda n: 0.2),
    "gains from batches": (64, lambda n: 0.01 + 0.0001 * n),
    "gains, and is slow": (64, lambda n: 0.15 + 0.001 * n),
    "does not gain": (64, lambda n: 0.012 * n),
}


@pytest.mark.parametrize("kind", WORKERS)
def test_under_five_times_its_capacity_a_worker_stays_busy_and_latency_at_the_target(kind):
    batch, run = WORKERS[kind]
    worker = Worker(0.1, batch=batch, run=run)
    capacity = batch / run(batch)
    worker.load(5 * capacity, 30)
    settled = [took for came, took in worker.latencies if came > 1000 + 15]
    assert len(settled) > 0.9 * 15 * capacity
    fewest = 8 / batch * run(batch)  # of those who are never refused, the last waits so long
    assert sum(settled) / len(settled) < 1.2 * max(0.1 + run(1), 3 * run(1), fewest)
    assert worker.refused > 3 * len(worker.latencies)


@pytest.mark.parametrize("kind", WORKERS)
def test_below_its_capacity_a_worker_refuses_nothing(kind):
    batch, run = WORKERS[kind]
    worker = Worker(0.1, batch=batch, run=run)
    worker.load(0.5 / run(1), 30)
    assert worker.refused == 0


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.3, 2.0])
@pytest.mark.parametrize("batch", [1, 8])
def test_eight_who_wait_for_their_answers_are_never_refused_however_slow_the_model(seconds, batch):
    worker = Worker(0.2, batch=batch, run=lambda n: seconds)
    worker.callers(8, 200 * seconds)
    assert len(worker.latencies) >= 199 * batch
    assert worker.refused == 0


def test_a_burst_at_an_idle_worker_is_queued_and_not_refused():
    worker = Worker(0.1, batch=1, run=lambda n: 0.01)
    worker.load(1_000_000, 0.0002)
    assert len(worker.latencies) > 100
    assert worker.refused == 0


def test_when_the_overload_is_over_so_is_the_limit():
    worker = Worker(0.1, batch=1, run=lambda n: 0.01)
    worker.load(500, 5)
    assert worker.limit.limit < 20
    worker.clock.now += 1
    refused = worker.refused
    worker.load(1_000_000, 0.0001)
    assert worker.refused == refused


def test_what_is_sheddable_is_refused_before_what_is_normal_and_that_before_what_is_critical():
    limit = ConcurrencyLimit(0.1, Clock(1000.0))
    limit.limit = 10
    admitted = {priority: [] for priority in Priority}
    for under_way in range(20):
        for priority in Priority:
            if limit.admits(priority):
                admitted[priority].append(under_way)
        limit.begin()
    assert [max(found) for found in admitted.values()] == [4, 9, 14]


def test_one_request_at_a_time_is_admitted_whatever_the_limit():
    limit = ConcurrencyLimit(0.1, Clock(1000.0))
    limit.limit = 1
    assert all(limit.admits(priority) for priority in Priority)


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 2), max_size=200))
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(rate, pauses):
    clock = Clock(1000.0)
    burst = max(1.0, rate)
    bucket = TokenBucket(rate, burst, clock)
    begin = clock.now
    given_out = 0
    for pause in pauses:
        clock.now += pause
        given_out += bucket.take() == 0.0
        assert given_out <= burst + rate * (clock.now - begin) + 1e-6


@given(st.floats(0.1, 1000))
def test_an_empty_bucket_says_when_it_has_a_token(rate):
    clock = Clock(1000.0)
    bucket = TokenBucket(rate, 1, clock)
    assert bucket.take() == 0.0
    seconds = bucket.take()
    clock.now += seconds * 0.9
    assert bucket.take() > 0.0
    clock.now += seconds * 0.1001
    assert bucket.take() == 0.0


def ask(quotas, tenant, times):
    """How many are admitted."""
    admitted = 0
    for _ in range(times):
        with suppress(RefusedError):
            quotas.take(Caller(tenant, Priority.NORMAL))
            admitted += 1
    return admitted


def test_who_is_refused_is_told_what_the_quota_is_and_when_to_come_back():
    quotas = Quotas({"acme": 4}, Clock(1000.0))
    ask(quotas, "acme", 4)
    with pytest.raises(RefusedError, match=r"'acme'.* 4 computed requests a second") as refused:
        quotas.take(Caller("acme", Priority.NORMAL))
    assert refused.value.retry_after == 0.25


def test_each_tenant_has_its_own_quota_and_those_not_named_have_one_each():
    quotas = Quotas({"acme": 5, "*": 2}, Clock(1000.0))
    assert [ask(quotas, tenant, 10) for tenant in ("acme", "b", "c", "")] == [5, 2, 2, 2]


def test_without_a_quota_for_others_they_have_no_limit():
    assert ask(Quotas({"acme": 5}, Clock(1000.0)), "b", 1000) == 1000


def test_many_tenants_do_not_fill_the_memory():
    clock = Clock(1000.0)
    quotas = Quotas({"*": 1}, clock)
    for number in range(50_000):
        quotas.take(Caller(f"t{number}", Priority.NORMAL))
        clock.now += 0.001
    assert len(quotas._buckets) <= 11_000


def test_a_caller_is_read_from_what_it_says():
    tenant, priority = ("ringmesh-tenant", "acme"), ("ringmesh-priority", "critical")
    assert caller_of(caller_metadata(())) is ANYBODY
    assert caller_of(caller_metadata((tenant,))) == Caller("acme", Priority.NORMAL)
    assert caller_of(caller_metadata((tenant, priority))) == Caller("acme", Priority.CRITICAL)
    with pytest.raises(InvalidArgumentError, match="sheddable, normal, critical"):
        caller_of(caller_metadata((("ringmesh-priority", "urgent"),)))
    with pytest.raises(InvalidArgumentError, match="twice"):
        caller_of(caller_metadata((tenant, tenant)))


def test_no_limit_is_known_at_first():
    assert ConcurrencyLimit(0.1, Clock(1000.0)).limit == math.inf
