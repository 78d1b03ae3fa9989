"""Half of all traffic falls on one worker's keys, or on one key: nobody is pushed above the bound."""

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from router.balancing.pool import BALANCE
from tests.system import processes
from tests.system.conftest import eventually
from tests.system.test_cache import fresh, infer

CALLERS = 24
SECONDS = 3.0
BOUND = math.ceil(BALANCE * CALLERS / 3)


@pytest.fixture(scope="module")
def workers(models):
    def start(name):
        return processes.start("services.inference", worker_id=name, models=models, threads=1)

    with ThreadPoolExecutor() as pool:
        started = list(pool.map(start, ("a", "b", "c")))
    yield started
    processes.kill(*started)


@pytest.fixture(scope="module")
def router(workers):
    # Not the admission of requests is looked at here, so all are admitted.
    addresses = ",".join(worker.address for worker in workers)
    started = processes.start("router", workers=addresses, queue_seconds=600)
    with grpc.insecure_channel(started.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        eventually(lambda: all(worker.healthy for worker in stub.GetRing(router_pb2.GetRingRequest()).workers))
    yield started.address
    processes.kill(started)


async def peaks(workers, done):
    """The most that each worker said it had at once."""
    most = {worker.address: 0 for worker in workers}
    channels = {worker.address: grpc.aio.insecure_channel(worker.address) for worker in workers}
    try:
        while not done.is_set():
            for address, channel in channels.items():
                stub = inference_pb2_grpc.InferenceWorkerServiceStub(channel)
                load = (await stub.Describe(inference_pb2.DescribeRequest())).load
                most[address] = max(most[address], load.requests)
            await asyncio.sleep(0.01)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))
    return most


async def keep_asking(channel, hot, others):
    """CALLERS at a time, by turns what is hot and what is not; how many were answered."""
    answered = 0
    end = time.monotonic() + SECONDS

    async def caller(number):
        nonlocal answered
        while time.monotonic() < end:
            answered += 1
            await infer(channel, hot() if answered % 2 else others())

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return answered


@pytest.mark.proof
@pytest.mark.alone
async def test_a_worker_that_owns_half_of_all_requests_stays_within_its_bound(router, workers):
    async with grpc.aio.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        owned = {worker_id: [] for worker_id in "abc"}
        while len(owned["a"]) < 400:
            request = fresh("slow")
            explained = await stub.Explain(router_pb2.ExplainRequest(request=request))
            owned[explained.owner].append(request)
        hot, others = iter(owned["a"] * 100), iter((owned["b"] + owned["c"]) * 100)
        done = asyncio.Event()
        watching = asyncio.create_task(peaks(workers, done))
        answered = await keep_asking(channel, hot.__next__, others.__next__)
        done.set()
        most = await watching
    print(f"{answered} answered by {CALLERS} callers; at most {most} at once, bound {BOUND}")
    assert max(most.values()) <= BOUND
    assert min(most.values()) > 0


@pytest.mark.proof
@pytest.mark.alone
async def test_one_hot_key_that_is_not_cached_pushes_no_worker_above_the_bound(router, workers):
    key = fresh("random")
    async with grpc.aio.insecure_channel(router) as channel:
        done = asyncio.Event()
        watching = asyncio.create_task(peaks(workers, done))
        answered = await keep_asking(channel, lambda: key, lambda: fresh("random"))
        done.set()
        most = await watching
    print(f"{answered} answered by {CALLERS} callers; at most {most} at once, bound {BOUND}")
    assert max(most.values()) <= BOUND
    assert min(most.values()) > 0


@pytest.mark.proof
async def test_explain_says_why_an_owner_at_its_bound_is_passed_over(router, workers):
    async with grpc.aio.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request = fresh("slow")
        idle = await stub.Explain(router_pb2.ExplainRequest(request=request))
        assert [candidate.rank for candidate in idle.candidates] == [0, 1, 2]
        assert idle.candidates[0].worker_id == idle.owner
        assert idle.candidates[0].chosen
        under_way = []
        while True:
            # Until one is full, requests that it owns.
            other = fresh("slow")
            if (await stub.Explain(router_pb2.ExplainRequest(request=other))).owner == idle.owner:
                under_way.append(asyncio.create_task(infer(channel, other)))
                await asyncio.sleep(0)
            busy = await stub.Explain(router_pb2.ExplainRequest(request=request))
            last = busy.candidates[-1]
            if last.worker_id == idle.owner:
                break
        assert busy.owner == idle.owner
        assert busy.candidates[0].chosen
        assert last.load >= last.bound > 0
        assert f"has {last.load} outstanding and may have {last.bound}" in last.reason
        await asyncio.gather(*under_way)
