"""Two regions, each with a router, a cache and a Valkey; one worker does the computing for both."""

import asyncio
import contextlib
import time

import grpc
import pytest
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc

from tests.system import processes
from tests.system.test_cache import fresh, infer, outcome
from tests.system.way import Way
from tests.valkeys import valkey_server

pytestmark = [pytest.mark.proof, pytest.mark.alone]


class Region:
    """A router, a cache and a Valkey."""

    def __init__(self, worker):
        self._opened = contextlib.ExitStack()
        self.valkey = self._opened.enter_context(valkey_server())
        self.cache_address = processes.free_address()
        self._worker = worker
        self._started = []

    def start(self, peer_address, **settings):
        common = {"redis_url": self.valkey.connection_url, "peer_regions": f"other={peer_address}"}
        self.cache = processes.start("cache", address=self.cache_address, **common, **settings)
        self._started.append(self.cache)
        self.router = processes.start("router", workers=self._worker.address, **common)
        self._started.append(self.router)

    def stop(self):
        processes.kill(*self._started)
        self._opened.close()


@pytest.fixture
def regions(start_worker, engine):
    worker = start_worker("worker")
    pair = [Region(worker), Region(worker)]
    pair[0].start(pair[1].cache_address, peer_bytes_per_second=0)
    pair[1].start(pair[0].cache_address)
    yield pair
    for region in pair:
        region.stop()


@pytest.fixture
async def channels(regions):
    async with contextlib.AsyncExitStack() as opened:
        yield [await opened.enter_async_context(grpc.aio.insecure_channel(r.router.address)) for r in regions]


async def learn_cost(channel):
    """What `slow` costs, and what the trip takes, is known after some requests."""
    async with asyncio.timeout(60):
        while await outcome(channel, fresh("slow")) != "miss":
            pass
        await asyncio.sleep(2.5)


async def test_what_a_peer_has_is_not_computed_again_where_computing_costs_more_than_the_trip(channels):
    here, there = channels
    await learn_cost(here)
    costly, cheap = fresh("slow"), fresh("mlp")
    await infer(there, costly)
    await infer(there, cheap)
    assert await outcome(here, costly) == "hit-peer"
    assert await outcome(here, costly) == "hit-local"
    assert await outcome(here, fresh("slow")) == "miss"


@pytest.fixture
async def wan(start_worker, engine):
    """Two regions with 40 ms between them, each way, and the way from the first to the second."""
    worker = await asyncio.to_thread(start_worker, "worker")
    pair = [Region(worker), Region(worker)]
    async with Way(pair[1].cache_address) as way:
        way.seconds = 0.04
        await asyncio.to_thread(pair[1].start, pair[0].cache_address, peer_bytes_per_second=0)
        await asyncio.to_thread(pair[0].start, way.address, peer_bytes_per_second=0)
        async with contextlib.AsyncExitStack() as opened:
            channels = [await opened.enter_async_context(grpc.aio.insecure_channel(r.router.address)) for r in pair]
            yield way, *channels
    for region in pair:
        await asyncio.to_thread(region.stop)


async def test_across_a_wan_the_first_answer_wins_and_a_trip_that_costs_more_than_computing_is_not_made(wan):
    way, here, there = wan
    await learn_cost(here)
    for _ in range(5):
        await outcome(here, fresh("mlp"))
    costly, cheap = fresh("slow"), fresh("mlp")
    for request in (costly, cheap):
        await infer(there, request)
    assert await outcome(here, costly) == "hit-peer"  # 80 ms, where computing takes 150 or more
    assert await outcome(here, cheap) == "miss"
    # The way has become long: computing, begun beside the look-up, is there first.
    late = fresh("slow")
    await infer(there, late)
    way.seconds = 2.0
    assert await outcome(here, late) == "miss"
    way.seconds = 0.04
    async with asyncio.timeout(120):
        while True:
            request = fresh("slow")
            await infer(there, request)
            if await outcome(here, request) == "hit-peer":
                break


async def test_a_hung_peer_costs_nothing_once_its_breaker_is_open(regions, channels):
    here, there = channels
    await learn_cost(here)
    regions[1].cache.process.send_signal(19)
    try:
        outcomes = [await outcome(here, fresh("slow")) for _ in range(3)]
        start = time.monotonic()
        outcomes += [await outcome(here, fresh("slow")) for _ in range(3)]
        hung = time.monotonic() - start
    finally:
        regions[1].cache.process.send_signal(18)
    start = time.monotonic()
    for _ in range(3):
        await outcome(there, fresh("slow"))
    assert set(outcomes) == {"miss"}
    assert hung < 3 * (time.monotonic() - start) + 2

    async with asyncio.timeout(60):
        while True:
            request = fresh("slow")
            await infer(there, request)
            await infer(there, fresh("mlp"))  # whose look-up takes the waiting write to Redis along
            if await outcome(here, request) == "hit-peer":
                break


async def test_popular_answers_are_copied_in_the_background(regions, channels):
    here, there = channels
    request = fresh("slow")
    for _ in range(20):
        await infer(here, request)  # the first region tells that it is valuable as its router leaves
    await asyncio.to_thread(processes.stop, regions[0].router)
    async with asyncio.timeout(60):
        while True:
            async with grpc.aio.insecure_channel(regions[1].cache.address) as channel:
                stats = await cache_pb2_grpc.CacheServiceStub(channel).Stats(cache_pb2.StatsRequest())
            if {tier.tier: tier.fills for tier in stats.tiers}["shared"]:
                break
            await asyncio.sleep(0.1)
    assert await outcome(there, request) == "hit-shared"


async def test_a_purge_reaches_the_peer_and_nothing_purged_comes_back_from_it(regions, channels):
    here, there = channels
    await learn_cost(here)
    request = fresh("slow")
    await infer(there, request)
    await infer(here, request)
    async with grpc.aio.insecure_channel(regions[0].cache.address) as channel:
        await cache_pb2_grpc.CacheServiceStub(channel).Purge(cache_pb2.PurgeRequest(model="slow"), timeout=60)
    assert await outcome(here, request) == "miss"
    async with asyncio.timeout(60):
        while await outcome(there, request) == "hit-local":
            await asyncio.sleep(0.05)
