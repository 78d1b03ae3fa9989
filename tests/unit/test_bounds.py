"""What is bounded, filled past its bound: it goes on working, stays within it, and says what it gave up.

`make test` runs this interpreted and compiled; tests/system/test_full_caches.py does it to installed processes.
"""

import asyncio

import numpy as np
import onnxruntime
import pytest

from cache.policy.doorkeeper import _MAX_WAITING, _MAX_WAITING_BYTES, Doorkeeper
from cache.policy.refusals import _MAX_KEPT, Refusals
from cache.policy.renewals import _MOST_AT_ONCE, Renewals
from cache.semantic import semantic_index
from cache.tiers.entry import Entry
from cache.tiers.local_tier import _MIN_STALE_SLOTS, LocalTier
from router.accounting.request_metrics import _MAX_MODELS, _MAX_TENANTS, OK, RequestMetrics
from router.admission.caller import Caller, Priority
from router.admission.quotas import _MANY, Quotas
from router.membership import outliers
from router.membership.outliers import Outliers
from services.console.data.trace_store import TraceStore
from services.inference.execution import device_session
from services.inference.execution.device_session import _PageLockedBuffers
from services.runtime.errors import InvalidArgumentError
from services.runtime.telemetry.request_log import RequestLog
from services.runtime.telemetry.span_export import _QUEUE, SpanQueue
from services.runtime.telemetry.spans import Kind, Process, Span
from tests.unit.clock import Clock


def key(number):
    return number.to_bytes(32, "big")


def test_a_local_tier_that_was_filled_ten_times_over_holds_the_last_entries():
    tier = LocalTier(1 << 20)
    for number in range(20_000):
        tier.put(key(number), Entry(bytes(200), 100))
    assert tier.counters.bytes <= tier.capacity
    assert tier.counters.evictions == 20_000 - tier.counters.entries > 15_000
    assert all(tier.get(key(number)) is not None for number in range(19_900, 20_000))


def test_a_local_tier_whose_keys_are_replaced_by_what_is_too_large_keeps_no_slots_of_them():
    tier = LocalTier(1 << 20)
    for _ in range(10 * _MIN_STALE_SLOTS):
        tier.put(key(1), Entry(bytes(10), 100))
        tier.put(key(1), Entry(bytes(1 << 20), 100))
    assert len(tier._heap) <= 2 * tier.counters.entries + _MIN_STALE_SLOTS + 1
    tier.put(key(1), Entry(b"small", 100))
    assert tier.get(key(1)).value == b"small"


def test_more_refusals_than_are_kept_leave_the_last_ones_in_force():
    refusals = Refusals(60, Clock())
    for number in range(3 * _MAX_KEPT):
        refusals.keep(key(number), InvalidArgumentError("wrong"))
    with pytest.raises(InvalidArgumentError):
        refusals.check(key(3 * _MAX_KEPT - 1))
    refusals.check(key(0))


class Shared:
    """Takes what is written."""

    def __init__(self):
        self.written = []

    def put(self, key, entry, kept_ms=None):
        self.written.append(key)


@pytest.mark.parametrize(("size", "count"), [(10, 2 * _MAX_WAITING), (1 << 20, 2 * (_MAX_WAITING_BYTES >> 20))])
def test_a_full_doorkeeper_forgets_the_oldest_and_still_writes_what_is_hit(size, count):
    shared = Shared()
    doorkeeper = Doorkeeper(shared)
    value = bytes(size)
    entries = [Entry(value, 1) for _ in range(count)]
    for number, entry in enumerate(entries):
        doorkeeper.offer(key(number), entry)
    assert doorkeeper._bytes <= _MAX_WAITING_BYTES
    assert len(doorkeeper._waiting) <= _MAX_WAITING
    for entry in entries:
        entry.hits = 1
    doorkeeper.look()
    assert shared.written[-1] == key(count - 1)
    assert len(shared.written) <= count // 2 + 1


async def test_more_renewals_than_run_at_once_are_left_to_later_hits():
    renewals, gate = Renewals(), asyncio.Event()

    async def work():
        await gate.wait()
        return "computed"

    for number in range(3 * _MOST_AT_ONCE):
        renewals.begin(key(number), work)
    assert len(renewals._running) == len(renewals._keys) == _MOST_AT_ONCE
    gate.set()
    while renewals._keys:
        await asyncio.sleep(0)
    assert renewals.counts["computed"] == _MOST_AT_ONCE
    renewals.begin(key(1), work)
    assert len(renewals._running) == 1


def test_a_full_semantic_index_finds_the_last_vectors_and_the_last_groups():
    index = semantic_index.SemanticIndex()
    vectors = np.random.default_rng(0).normal(size=(2 * semantic_index._MOST_VECTORS, 8)).astype(np.float32)
    for number, vector in enumerate(vectors):
        index.add(b"group", vector, key(number))
    (group,) = index._groups.values()
    assert len(group._keys) == len(group._indexes) == semantic_index._MOST_VECTORS
    assert index.nearest(b"group", vectors[-1]).key == key(len(vectors) - 1)
    for number in range(3 * semantic_index._MOST_GROUPS):
        index.add(b"%d" % number, vectors[0], key(number))
    assert len(index._groups) == semantic_index._MOST_GROUPS
    assert index.nearest(b"47", vectors[0]).key == key(47)


def test_outlier_statistics_of_models_that_are_replaced_for_ever_are_bounded_and_still_judge():
    clock = Clock()
    judge = Outliers(clock)
    for number in range(5 * outliers._MAX_MODELS):
        judge.answered("a", key(number), 0.01)
    assert len(judge.usual) <= 2 * outliers._MAX_MODELS
    assert judge.usual.dropped >= 3 * outliers._MAX_MODELS
    for _ in range(outliers.CONSECUTIVE_FAILURES):
        judge.failed("b")
    assert list(judge.ejected({"a": True, "b": True})) == ["b"]


class Destination:
    """Takes nothing while it is shut."""

    name = "test"

    def __init__(self):
        self.fate = "again"

    def pack(self, span):
        return span

    async def send(self, batch):
        return self.fate

    async def close(self):
        pass


async def test_a_span_queue_whose_destination_is_gone_drops_and_counts():
    destination = Destination()
    queue = SpanQueue(destination)
    span = Span(Process("router", "r1"), "ab" * 16, "cd" * 8, "", "call", Kind.SERVER, 10, 20, {})
    put = 0
    while queue.has_room:
        queue.put([span] * 100)
        put += 100
    queue.put([span] * 5000)
    put += 5000
    assert len(queue._waiting) <= _QUEUE
    destination.fate = "sent"
    await queue.close()
    assert queue.dropped >= 5000
    assert queue.sent + queue.dropped == put


def test_a_log_that_is_flooded_counts_what_it_left_out(caplog):
    log = RequestLog(Clock())
    for _ in range(10_000):
        log.write(code="INTERNAL", error="e" * 10_000, duration_ns=1)
    assert len(caplog.records) == 20
    assert [sample.value for sample in log.samples()] == [10_000 - 20]


def test_a_full_trace_store_keeps_the_newest_within_its_bytes():
    from opentelemetry.proto.trace.v1 import trace_pb2

    store = TraceStore(max_bytes=1 << 20, max_traces=500)
    for number in range(1, 2000):
        span = trace_pb2.Span(trace_id=number.to_bytes(16, "big"), span_id=b"spanspan", name="n" * 1000)
        store.add("service", span)
    assert store.bytes <= 1 << 20
    assert store.evicted == 1999 - len(store) > 1000
    assert store.find((1999).to_bytes(16, "big").hex()) is not None


def test_page_locked_buffers_of_ever_other_shapes_are_bounded(monkeypatch):
    monkeypatch.setattr(device_session, "MAX_FREE_BYTES", 1 << 20)

    def allocate(shape, dtype):
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype)

    buffers = _PageLockedBuffers(allocate)
    for rows in range(1, 3000):
        buffers.give_back({"y": buffers.take("y", (rows, 16), np.float32)})
        assert buffers.free_bytes <= 1 << 20
    assert len(buffers._free) <= device_session._MAX_SHAPES
    held = buffers.free_bytes
    buffers.take("y", (2999, 16), np.float32)
    assert buffers.free_bytes == held - 2999 * 16 * 4


def test_quotas_of_more_tenants_than_are_known_hold_for_those_that_use_theirs_up():
    clock = Clock()
    quotas = Quotas({"*": 1.0}, clock)
    for number in range(5 * _MANY):
        clock.now += 0.001
        quotas.take(Caller(f"t{number}", Priority.NORMAL))
    assert len(quotas._buckets) <= 2 * _MANY
    with pytest.raises(Exception, match="quota"):
        quotas.take(Caller(f"t{5 * _MANY - 1}", Priority.NORMAL))


def test_metrics_of_ever_other_models_and_tenants_are_bounded_and_lose_no_request():
    metrics = RequestMetrics()
    count = 3 * max(_MAX_MODELS, _MAX_TENANTS)
    for number in range(count):
        metrics.count(("ModelInfer", f"m{number}", "1", f"t{number}", OK, "miss"), 1000, 10)
        metrics.failed(f"m{number}", "1", "internal")
    samples = list(metrics.samples())
    requests = [sample for sample in samples if sample.family.name == "ringmesh_requests_total"]
    assert sum(sample.value for sample in requests) == count
    assert len(requests) <= max(_MAX_MODELS, _MAX_TENANTS) + 2
