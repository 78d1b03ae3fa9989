"""What the meter counts of requests on the router's path, and what the ledger gets of it."""

import asyncio

import pytest
from ringmesh.inference.v1 import inference_pb2
from ringmesh.ledger.v1 import ledger_pb2

from cache.tiers.entry import Entry
from router.accounting.budgets import Budgets
from router.accounting.meter import Meter
from router.accounting.usage import Up, Usage
from services.runtime.telemetry.tracing import Trace
from tests.unit.router.request.test_path import DIGEST, WRONG, Router, request

TRACE = "0af7651916cd43dd8448eb211c80319c"
NOW = 1_795_000_000


def result(**timing):
    made = {"queue_us": 30, "compute_us": 1000, "share_us": 250, "batch_requests": 4, "batch_rows": 4} | timing
    return inference_pb2.WorkResult(
        response=b"answer", model_digest=DIGEST, timing=inference_pb2.Timing(provider="CPUExecutionProvider", **made)
    )


class Sender:
    """Keeps what is submitted."""

    router_id, epoch, is_idle = "router-id", 1, True

    def __init__(self):
        self.batches = []

    async def submit(self, batch, records, requests):
        self.batches.append((ledger_pb2.Batch.FromString(batch), records, requests))


async def flushed(router, clock=lambda: NOW, workers=()):
    sender = Sender()
    usage = Usage(router.meter, router.budgets, sender, "eu", lambda: workers, clock)
    await usage.flush()
    return sender.batches


async def only_batch(router):
    ((batch, records, requests),) = await flushed(router)
    assert records == len(batch.at_ms)
    assert requests == sum(batch.requests)
    return batch


def dimension(batch, record):
    return batch.dimensions[batch.dimension[record] if batch.dimension else 0]


async def test_hits_are_one_record_and_a_miss_is_its_own():
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    for _ in range(3):
        router.send()
    batch = await only_batch(router)
    hits, miss = (dimension(batch, record) for record in (0, 1))
    assert (hits.outcome, miss.outcome, hits.status) == ("hit-local", "miss", "OK")
    assert (miss.model, miss.version, miss.region, miss.worker_type) == ("m", "1", "eu", "cpu")
    assert [*batch.requests] == [3, 1]
    assert [*batch.compute_us] == [0, 250]
    assert [*batch.saved_us] == [750, 0]
    assert [*batch.run_us] == [0, 1000]
    assert [*batch.queue_us] == [0, 30]
    assert [*batch.batch_requests] == [0, 4]
    assert [*batch.response_bytes] == [3 * len(b"answer"), len(b"answer")]
    assert [*batch.request_bytes] == [3 * len(request()), len(request())]
    assert batch.trace_ids[:16] == bytes(16) != batch.trace_ids[16:]
    assert batch.total_us[0] == batch.router_us[0]
    assert batch.router_us[1] < batch.total_us[1]


MISS = ("ModelInfer", "m", "1", "", "OK", "miss")


def computed(meter, end_ms, compute_us=250, labels=MISS, alone=False):
    trace = Trace(TRACE, "", alone)
    trace.span("execute", 0, 0, {}, result=result(share_us=compute_us))
    start, end = (end_ms - 2) * 1_000_000, end_ms * 1_000_000
    meter.answered(labels, trace, "CPUExecutionProvider", Entry(b"answer", 0), start, end, 1_000_000, 9, alone=alone)


def test_quick_requests_that_end_together_share_a_record():
    meter = Meter(Budgets())
    for end_ms in (100, 103, 109):
        computed(meter, end_ms)
    ((records, _),) = [meter.take()]
    (record,) = records
    assert record == (MISS, "cpu", 109, 3, 6000, 3000, 0, 90, 3000, 750, 0, 12, 12, 0, 27, 18, b"")


@pytest.mark.parametrize(
    "other",
    [
        {"end_ms": 110},
        {"end_ms": 103, "compute_us": 1000},
        {"end_ms": 103, "alone": True},
        {"end_ms": 103, "labels": (*MISS[:3], "tenant", *MISS[4:])},
    ],
)
def test_what_is_costly_traced_of_another_series_or_later_is_a_record_of_its_own(other):
    meter = Meter(Budgets())
    computed(meter, 100)
    computed(meter, **other)
    records, _ = meter.take()
    assert [(record[3], record[-1].hex()) for record in records] == [(1, TRACE), (1, TRACE)]
    computed(meter, 100)
    assert [record[3] for record in meter.take()[0]] == [1]


async def test_a_joined_request_is_credited_and_not_charged():
    router = Router()
    router.send()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    batch = await only_batch(router)
    assert {dimension(batch, record).outcome: batch.compute_us[record] for record in (0, 1)} == {
        "joined": 0,
        "miss": 250,
    }
    assert sum(batch.saved_us) == 250


async def test_a_traced_hit_is_a_record_of_its_own():
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    await flushed(router)
    router.send(metadata=(("traceparent", f"00-{TRACE}-{1:016x}-01"),))
    batch = await only_batch(router)
    assert dimension(batch, 0).outcome == "hit-local"
    assert batch.trace_ids.hex() == TRACE
    assert [*batch.saved_us] == [250]


@pytest.mark.parametrize(("data", "status"), [(b"\xff", "INVALID_ARGUMENT"), (request(model="x"), "NOT_FOUND")])
async def test_a_request_that_is_refused_is_counted(data, status):
    router = Router()
    router.send(data)
    batch = await only_batch(router)
    assert (dimension(batch, 0).status, dimension(batch, 0).outcome) == (status, "")
    assert [*batch.requests] == [1]


async def test_a_failure_of_the_worker_is_counted():
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(WRONG)
    batch = await only_batch(router)
    assert dimension(batch, 0).status == "INVALID_ARGUMENT"


async def test_what_is_computed_after_the_caller_left_is_charged_to_its_request():
    router = Router()
    leave = router.send()
    await asyncio.sleep(0)
    leave()
    router.worker.end(result())
    batch = await only_batch(router)
    assert [*batch.requests] == [1, 0]
    assert [*batch.compute_us] == [0, 250]
    assert {dimension(batch, record).status for record in (0, 1)} == {"CANCELLED"}


async def test_what_joined_a_run_on_the_worker_is_not_charged_twice():
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result(joined=True))
    assert not (await only_batch(router)).compute_us


async def test_seconds_of_workers_and_the_router_are_reported_once():
    router = Router()
    now = [NOW - NOW % 60 + 58.5]
    sender = Sender()
    usage = Usage(router.meter, router.budgets, sender, "eu", lambda: [Up("w", "gpu", "eu")], lambda: now[0])
    await usage.flush()
    for _ in range(4):
        now[0] += 0.8
        router.send(b"")
        await usage.flush()
    seconds = {}
    for batch, _, _ in sender.batches:
        for time in batch.worker_times:
            key = (time.worker_id, time.worker_type, time.minute)
            assert not seconds.get(key, 0) & time.seconds
            seconds[key] = seconds.get(key, 0) | time.seconds
    minute = NOW // 60
    for worker in (("w", "gpu"), ("router-id", "router")):
        assert seconds[*worker, minute] == 0b11 << 58
        assert seconds[*worker, minute + 1] == 0b10 | 1


async def test_an_idle_router_reports_rarely():
    router = Router()
    now = [float(NOW)]
    sender = Sender()
    usage = Usage(router.meter, router.budgets, sender, "", list, lambda: now[0])
    for _ in range(20):
        await usage.flush()
        now[0] += 0.8
    assert len(sender.batches) == 2
