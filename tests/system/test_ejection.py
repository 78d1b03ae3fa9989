"""Who answers badly is left out for a while, longer each time, and comes back slowly."""

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
import pytest
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from router.balancing.pool import BALANCE
from router.membership.slow_start import FIRST
from tests.system.callers import eventually
from tests.system.steady_load import steady_load
from tests.system.test_cache import fresh, infer
from tests.system.way import Way

pytestmark = pytest.mark.proof

EXECUTE = "/ringmesh.inference.v1.InferenceWorkerService/Execute"


@pytest.fixture
def workers(start_worker):
    with ThreadPoolExecutor() as pool:
        # Over TCP, where a way can be put between.
        return list(pool.map(lambda name: start_worker(name, socket_dir=""), ("a", "b", "c")))


class Operator:
    """What a router says of a worker, and has said since."""

    def __init__(self, channel, address):
        self._stub = router_pb2_grpc.RouterServiceStub(channel)
        self._address = address
        self.reasons = []
        self.restored = 0
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self):
        async for event in self._stub.Watch(router_pb2.WatchRequest()):
            if event.address == self._address:
                if event.kind == event.KIND_EJECTED:
                    self.reasons.append(event.reason)
                self.restored += event.kind == event.KIND_RESTORED

    async def worker(self):
        ring = await self._stub.GetRing(router_pb2.GetRingRequest())
        return next(worker for worker in ring.workers if worker.address == self._address)

    async def was_ejected(self, why):
        async def told():
            return any(why in reason for reason in self.reasons)

        await eventually(told)

    async def serves(self):
        async def healthy():
            return (await self.worker()).healthy

        await eventually(healthy)

    def close(self):
        self._watching.cancel()


@asynccontextmanager
async def behind_a_way(workers, start_router):
    """A router that reaches the first worker over a way, and what it says of that worker."""
    async with Way(workers[0].address, EXECUTE) as way:
        addresses = [way.address, *(worker.address for worker in workers[1:])]
        router = (await asyncio.to_thread(start_router, addresses, None)).address
        async with grpc.aio.insecure_channel(router) as channel:
            operator = Operator(channel, way.address)
            await operator.serves()
            yield way, router, operator
            operator.close()


async def test_a_worker_that_loses_every_request_is_ejected_for_longer_each_time(workers, start_router):
    async with behind_a_way(workers, start_router) as (way, router, operator), steady_load(router) as load:
        await load.phase("before", 1.5)
        way.breaks = True
        await load.phase("during", 0)
        # It answers Describe all the time, so it would be asked again.
        await operator.was_ejected("ejected for 2 s: 3 attempts in a row failed")
        await operator.was_ejected("ejected for 4 s: 3 attempts in a row failed")
        way.breaks = False
        restored = operator.restored
        await operator.serves()
        assert operator.restored >= restored
        ramp = (await operator.worker()).ramp
        await load.phase("after", 2)
    load.report("every request to a worker lost")
    assert load.errors == []
    assert ramp < 1
    assert load.workers_of("after") == {"a", "b", "c"}


async def test_a_worker_that_is_far_slower_than_the_others_is_ejected_and_costs_the_callers_nothing_more(
    workers, start_router
):
    async with behind_a_way(workers, start_router) as (way, router, operator), steady_load(router) as load:
        await load.phase("before", 1.5)
        way.seconds = 0.15
        await load.phase("until it is ejected", 0)
        await operator.was_ejected("ms slower than the others")
        await load.phase("ejected", 0.5)  # of the two seconds that it lasts
        await load.phase("until it is back", 0)
        way.seconds = 0.0
        await operator.serves()
        await load.phase("after", 2)
    load.report("a worker 300 ms slower")
    assert load.errors == []
    assert load.workers_of("ejected") == {"b", "c"}
    assert load.workers_of("after") == {"a", "b", "c"}


async def test_a_newcomer_takes_little_at_first(workers, start_worker, start_router):
    callers = 24
    address = workers[2].address
    workers[2].process.terminate()
    workers[2].process.wait(60)
    router = start_router([worker.address for worker in workers], None, queue_seconds=600).address
    async with grpc.aio.insecure_channel(router) as channel:
        operator = Operator(channel, address)
        # It has met the others.
        await asyncio.sleep(5.5)
        end = time.monotonic() + 60

        async def caller():
            while time.monotonic() < end:
                await infer(channel, fresh("random"))

        asking = asyncio.gather(*(caller() for _ in range(callers)))
        await asyncio.to_thread(start_worker, "c", address=address)
        await operator.serves()
        most = {}
        while (worker := await operator.worker()).ramp < 1:
            ramp = round(worker.ramp, 1)
            most[ramp] = max(most.get(ramp, 0), worker.in_flight)
            await asyncio.sleep(0.01)
        end = 0
        await asking
        operator.close()
    print(f"\nmost outstanding at the newcomer, by how far it had started: {most}")
    assert min(most) == FIRST
    assert len(most) > 5
    for ramp, found in most.items():
        assert found <= math.ceil(BALANCE * (callers + 1) * ramp / (2 + ramp)) + 1
