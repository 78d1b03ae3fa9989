"""What the meter counts of requests on the router's path, and what the ledger gets of it."""

import asyncio
import time

import pytest
from blake3 import blake3
from ringmesh.inference.v1 import inference_pb2
from ringmesh.ledger.v1 import ledger_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.tiers.entry import Entry
from router.accounting.key_samples import KeySamples
from router.accounting.usage import Up, Usage
from services.ledger.ingest.batch import read
from services.runtime.telemetry.tracing import Trace
from tests.unit.clock import Clock
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

    router_id, epoch, is_idle, dropped_requests = "router-id", 1, True, 0

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


async def test_a_model_that_a_worker_with_a_gpu_runs_on_its_cpu_is_charged_as_that_worker():
    """Which is paid for as a GPU's: a price of its own would be paid beside that."""
    router = Router()
    router.member.worker_type = "gpu"
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    batch = await only_batch(router)
    assert dimension(batch, 0).worker_type == "gpu"


async def test_steps_on_workers_of_several_types_are_charged_at_the_price_of_each():
    router = Router()
    trace = Trace(TRACE, "", sampled=True)
    for kind, us in (("cpu", 70), ("gpu", 250), ("gpu", 30), ("cpu", 5)):
        trace.span("execute", 0, 1, {}, worker="w", worker_type=kind, result=result(share_us=us))
    router.meter.failed(("infer", "m", "1", "", "INTERNAL", "error"), trace, "cpu", NOW * 10**9, NOW * 10**9, 0, 9)
    batch = await only_batch(router)
    charged = [(dimension(batch, record).worker_type, batch.compute_us[record]) for record in range(3)]
    assert charged == [("cpu", 70), ("gpu", 280), ("cpu", 5)]
    assert [*batch.requests] == [0, 0, 1]


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
        for up in batch.worker_times:
            key = (up.worker_id, up.worker_type, up.minute)
            assert not seconds.get(key, 0) & up.seconds
            seconds[key] = seconds.get(key, 0) | up.seconds
    minute = NOW // 60
    for worker in (("w", "gpu"), ("router-id 1", "router")):
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


HOUR_NS = 3600 * 10**9


async def test_a_clock_that_is_set_back_under_a_request_changes_only_its_times(monkeypatch):
    router = Router()
    router.send()
    await asyncio.sleep(0)
    back = time.time_ns() - HOUR_NS
    monkeypatch.setattr(time, "time_ns", lambda: back)
    router.worker.end(result())
    router.send()
    clock = Clock(back / 1e9)
    sender = Sender()
    await Usage(router.meter, router.budgets, sender, "eu", list, clock).flush()
    ((batch, _, requests),) = sender.batches
    assert requests == 2
    assert {dimension(batch, record).outcome for record in (0, 1)} == {"hit-local", "miss"}
    assert sum(batch.compute_us) == sum(batch.saved_us) == 250
    assert {*batch.at_ms} == {back // 1_000_000}
    assert max(batch.total_us, default=0) < 1_000_000
    told = v2.ModelStatistics(name="m", version="1")
    router.requests.add_to(told)
    assert told.inference_stats.cache_miss.ns == 0


async def test_an_idle_router_whose_clock_is_set_back_goes_on_reporting_what_is_up():
    router, sender = Router(), Sender()
    clock = Clock(float(NOW))
    usage = Usage(router.meter, router.budgets, sender, "eu", lambda: [Up("w", "cpu", "eu")], clock)
    for _ in range(20):
        await usage.flush()
        clock.now += 0.8
    assert len(sender.batches) == 2
    clock.now = back = float(NOW - 3600)
    for _ in range(20):
        await usage.flush()
        clock.now += 0.8
    later = [up for batch, _, _ in sender.batches[2:] for up in batch.worker_times]
    assert {up.minute for up in later if up.minute < (NOW - 1800) // 60} == {int(back) // 60}


def tenants(batch):
    counted = {}
    for record, requests in enumerate(batch.requests):
        name = dimension(batch, record).tenant
        counted[name] = counted.get(name, 0) + requests
    return counted


async def test_tenants_beyond_the_bound_of_a_day_are_counted_under_one_name():
    router = Router()  # of three tenants
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    for number in range(1, 50):
        router.send(metadata=(("ringmesh-tenant", f"invented-{number}"),))
    router.send(b"\xff", metadata=(("ringmesh-tenant", "fails"),))
    router.send(metadata=(("ringmesh-tenant", "invented-1"),))
    batch = await only_batch(router)
    assert tenants(batch) == {"": 1, "invented-1": 2, "invented-2": 1, "(other)": 48}
    assert router.meter.unnamed == 48
    assert len(batch.dimensions) == 5


async def test_the_next_day_has_tenants_of_its_own(monkeypatch):
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    for day in range(2):
        for number in range(4):
            router.send(metadata=(("ringmesh-tenant", f"day-{day}-{number}"),))
        await flushed(router)
        today = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda today=today: today + 86_400 * 10**9)
    # "" of the first day, and of each four one or two.
    assert router.meter.unnamed == 2 + 1


async def test_a_tenant_that_has_a_budget_is_always_named():
    router = Router()
    budget = ledger_pb2.Budget(tenant="acme", period=ledger_pb2.PERIOD_DAY, hard_nano=10**12)
    lease = ledger_pb2.BudgetLease(budget=budget, amount_nano=10**12, renews_at_ms=1 << 50)
    router.budgets.renewed(ledger_pb2.LeaseResponse(leases=[lease], nano_per_second={"cpu": 10**9}), [])
    for name in ("a", "b", "c", "d", "acme"):
        router.send(b"\xff", metadata=(("ringmesh-tenant", name),))
    assert tenants(await only_batch(router)) == {"a": 1, "b": 1, "c": 1, "(other)": 1, "acme": 1}


async def test_keys_of_a_sample_are_reported_with_their_requests():
    router = Router()
    router.meter.samples.below = 256
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    for _ in range(3):
        router.send()
    (sample,) = (await only_batch(router)).key_samples
    assert (sample.model, sample.version, sample.region, sample.worker_type) == ("m", "1", "eu", "cpu")
    assert (sample.requests, sample.compute_us, sample.value_bytes) == (4, 250, len(b"answer"))
    assert (sample.below, sample.cacheable) == (256, True)
    assert sample.key


def entry(size=1):
    return Entry(bytes(size), 7)


def test_the_threshold_falls_with_the_number_of_keys_and_rises_again():
    samples = KeySamples()
    for number in range(20_000):
        key = blake3(number.to_bytes(4)).digest()
        if key[0] < samples.below:
            samples.add("m", "1", "cpu", key, entry(), number, cacheable=True)
    taken, below = samples.take()
    assert below == 8
    assert 512 < len(taken) <= 1024
    assert all(name[4][0] < below for name in taken)
    assert samples.take() == ({}, 8)
    assert samples.below == 16


def test_an_older_threshold_holds_the_newer_one():
    samples = KeySamples()
    samples.below = 1
    for place in range(250):
        samples.add("m", "1", "cpu", bytes((0, place)), entry(), 0, cacheable=True)
    assert samples.take()[1] == 1
    assert samples.below == 2


async def test_names_that_are_too_long_for_the_ledger_are_cut_and_the_batch_is_taken():
    router = Router()
    router.send()
    await asyncio.sleep(0)
    router.worker.end(result())
    sender = Sender()
    name = "\N{SNOWMAN}" * 500
    usage = Usage(router.meter, router.budgets, sender, name, lambda: [Up(name, "cpu", name)], lambda: NOW)
    await usage.flush()
    data = sender.batches[0][0].SerializeToString()
    digest = blake3(data).digest(16)
    batch = read(ledger_pb2.AppendRequest(router_id="r", start_epoch=1, sequence=1, batch=data, digest=digest))
    assert batch.series[0].region == batch.worker_minutes[0].worker_id == "\N{SNOWMAN}" * 85


async def test_what_a_full_disk_loses_counts_against_its_budget_all_the_same():
    router = Router()
    budget = ledger_pb2.Budget(tenant="acme", period=ledger_pb2.PERIOD_DAY, hard_nano=10**12)
    lease = ledger_pb2.BudgetLease(budget=budget, amount_nano=10**12, renews_at_ms=1 << 50)
    answer = ledger_pb2.LeaseResponse(leases=[lease], nano_per_second={"cpu": 10**9, "router": 10**9})
    router.budgets.renewed(answer, [])
    usage = Usage(router.meter, router.budgets, sender := Sender(), "eu", list, lambda: NOW)
    spent = []
    for is_lost in (False, True, False):
        before = router.budgets.marks()[0][1]
        router.send(b"\xff", metadata=(("ringmesh-tenant", "acme"),))
        spent.append(router.budgets.marks()[0][1] - before)
        await usage.flush()
        sender.dropped_requests += is_lost
    await usage.flush()
    (use,) = router.budgets.request("router", 1)[0].uses
    assert use.unsent_nano == -(-spent[1] // 10**9) > 0
    # In the next period, nobody asks for it.
    lease.renews_at_ms += 1
    router.budgets.renewed(answer.__class__(leases=[lease]), router.budgets.marks())
    assert not router.budgets.request("router", 1)[0].uses[0].unsent_nano
