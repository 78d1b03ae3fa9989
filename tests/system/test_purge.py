"""Purges: what was filed before is served by nobody after the call returns."""

import asyncio
import contextlib
import time
import uuid
from unittest.mock import AsyncMock

import grpc
import pytest
from redis.asyncio import Redis
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from cache.api.service import CacheService
from cache.keys.invalidation import EPOCHS
from cache.settings import CacheSettings
from cache.tiers.entry import EntryFrames
from cache.tiers.evictions import Evictions
from services.runtime.errors import NotFoundError
from tests.system import processes
from tests.system.test_cache import fresh, infer, outcome

HITS = {"hit-local", "hit-shared"}


@pytest.fixture(scope="module")
def second_router(stack, engine):
    settings = {"workers": ",".join(stack.workers), "redis_url": stack.redis_url, "engine": engine}
    router = processes.start("router", **settings)
    yield router.address
    processes.stop(router)


@pytest.fixture
async def channels(stack, second_router):
    """To two routers of one Redis, and to the cache service."""
    addresses = (stack.router, second_router, stack.cache)
    async with contextlib.AsyncExitStack() as opened:
        yield [await opened.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses]


async def known(channels, requests):
    """Until both routers hit."""
    for channel in channels[:2]:
        for request in requests:
            async with asyncio.timeout(60):
                while await outcome(channel, request) not in HITS:
                    pass


async def purge(channel, **scope):
    return await cache_pb2_grpc.CacheServiceStub(channel).Purge(cache_pb2.PurgeRequest(**scope), timeout=60)


@pytest.mark.parametrize("through", [0, 2], ids=["router", "cache"])
async def test_a_purged_model_is_computed_anew_on_every_router(channels, through):
    purged, other = [fresh() for _ in range(10)], fresh("slow")
    await known(channels, [*purged, other])
    done = await purge(channels[through], model="mlp")
    assert done.confirmed >= 3
    for request in purged:
        assert await outcome(channels[1], request) == "miss"
    assert await outcome(channels[0], other) in HITS
    assert await outcome(channels[1], other) in HITS


async def test_one_answer_is_purged_by_its_key(channels):
    purged, other = fresh(), fresh()
    await known(channels, [purged, other])
    told = await router_pb2_grpc.RouterServiceStub(channels[0]).Explain(router_pb2.ExplainRequest(request=purged))
    await purge(channels[2], key=bytes.fromhex(told.key))
    assert await outcome(channels[1], purged) == "miss"
    assert await outcome(channels[1], other) in HITS
    await known(channels, [purged])


async def test_everything_is_purged(channels):
    requests = [fresh(), fresh("slow")]
    await known(channels, requests)
    await purge(channels[1], everything=True)
    for request in requests:
        assert await outcome(channels[0], request) == "miss"


async def test_a_tenant_is_purged_and_no_other(channels):
    request = fresh("scoped")
    outcomes = []
    for turn in range(3):
        if turn == 2:
            await purge(channels[2], tenant="a")
        told = [(await infer(channels[0], request, [("ringmesh-tenant", tenant)]))[1] for tenant in ("a", "b")]
        outcomes += [each["ringmesh-cache"] for each in told]
    assert outcomes == ["miss", "miss", "hit-local", "hit-local", "miss", "hit-local"]


async def test_a_tenants_purge_says_where_it_may_touch_less_than_was_meant(channels):
    tenant = uuid.uuid4().hex
    assert (await purge(channels[0], tenant=tenant)).warning == ""  # `scoped` keeps tenants apart
    assert "ringmesh_tenant_scope" in (await purge(channels[2], tenant=tenant)).warning
    assert "a router checks it" in (await purge(channels[2], model=tenant)).warning
    assert (await purge(channels[2], model=tenant, even_if_unknown=True)).warning == ""


async def test_a_tenants_purge_says_that_no_model_keeps_tenants_apart(engine):
    mesh = CacheSettings(address="127.0.0.1:0").create_mesh("secret")
    service = CacheService(mesh, Evictions(mesh.local), EntryFrames("secret"), tenant_scoped=list)
    answer = await service._purge(cache_pb2.PurgeRequest(tenant="acme"), None)
    assert "no answer of a model was purged" in answer.warning
    await mesh.close()


async def test_a_purge_of_a_model_that_nobody_knows_names_the_nearest_and_the_way_to_purge_it_all_the_same(engine):
    mesh = CacheSettings(address="127.0.0.1:0").create_mesh("secret")

    def usages():
        return [cache_pb2.UsageStats(model="unloaded")]

    service = CacheService(mesh, Evictions(mesh.local, lambda: {bytes(16): "resnet"}), EntryFrames("secret"), usages)
    mesh.purges.purge = AsyncMock(return_value=(1, 1))
    with pytest.raises(NotFoundError, match=r"no model 'resnet5' is served.*did you mean 'resnet'\?.*even_if_unknown"):
        await service._purge(cache_pb2.PurgeRequest(model="resnet5"), None)
    with pytest.raises(NotFoundError, match="there are: resnet"):
        await service._purge(cache_pb2.PurgeRequest(model="xyz"), None)
    mesh.purges.purge.assert_not_called()
    await service._put(cache_pb2.PutRequest(namespace="ours", key=b"key", value=b"value"), None)
    for request in ({"model": name} for name in ("resnet", "unloaded", "ours")):
        await service._purge(cache_pb2.PurgeRequest(**request), None)
    await service._purge(cache_pb2.PurgeRequest(model="xyz", even_if_unknown=True), None)
    assert mesh.purges.purge.await_count == 4
    await mesh.close()


@pytest.mark.parametrize(
    "scope", [{}, {"everything": False}, {"model": ""}, {"key": b"short"}, {"tenant": "x" * 300}], ids=str
)
async def test_a_purge_without_a_scope_is_refused(channels, scope):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await purge(channels[2], **scope)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_who_watches_hears_of_purges_so_far_and_of_each_new_one(channels):
    namespace = uuid.uuid4().hex
    await purge(channels[2], model=namespace)
    watch = cache_pb2_grpc.CacheServiceStub(channels[2]).Watch(cache_pb2.WatchRequest(), timeout=120)
    first = await watch.read()
    assert f"model:{namespace}" in first.purges
    await purge(channels[1], tenant=namespace)
    assert set((await watch.read()).purges) == {f"tenant:{namespace}"}
    watch.cancel()


async def test_purges_that_redis_lost_are_written_back(channels, stack):
    epoch = (await purge(channels[0], tenant=uuid.uuid4().hex)).epoch
    async with Redis.from_url(stack.redis_url) as redis:
        await redis.delete(EPOCHS)
        async with asyncio.timeout(60):
            while int(await redis.hget(EPOCHS, "version") or 0) != epoch:
                await asyncio.sleep(0.02)


async def test_a_purge_is_confirmed_by_each_of_the_routers_that_share_a_port(start_router, stack, valkey):
    address = processes.free_address()
    for _ in range(2):
        addresses = {"address": address, "metrics_address": processes.free_address()}
        await asyncio.to_thread(start_router, stack.workers, valkey.connection_url, share_port="true", **addresses)
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(60):
        while (await purge(channel, everything=True)).confirmed < 2:  # the second may still be starting
            pass


class Cable:
    """TCP from a port of its own to `port`, which can be cut."""

    def __init__(self, port):
        self._port = port
        self._open = set()
        self.is_cut = False

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()

    def cut(self):
        self.is_cut = True
        for writer in self._open:
            writer.close()

    async def _connect(self, reader, writer):
        if self.is_cut:
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, back}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()


@pytest.mark.proof
async def test_a_router_cut_off_serves_nothing_purged_once_the_call_returns_nor_when_it_is_back(
    start_router, start_worker, valkey
):
    worker = start_worker("worker")
    lease = {"purge_lease_seconds": 5}
    async with Cable(valkey.port) as cable, contextlib.AsyncExitStack() as opened:
        far = await asyncio.to_thread(start_router, [worker.address], cable.url, **lease)
        near = await asyncio.to_thread(start_router, [worker.address], valkey.connection_url, **lease)
        channels = [
            await opened.enter_async_context(grpc.aio.insecure_channel(router.address)) for router in (near, far)
        ]
        requests = [fresh() for _ in range(5)]
        await known(channels, requests)
        cable.cut()
        start = time.monotonic()
        assert await outcome(channels[1], requests[0]) == "hit-local"
        done = await purge(channels[0], model="mlp")
        assert done.confirmed == 1
        assert time.monotonic() - start >= 5
        assert await outcome(channels[1], requests[0]) == "miss"
        assert await outcome(channels[1], requests[0]) == "hit-local"  # computed since
        cable.is_cut = False
        for request in requests[1:]:
            assert await outcome(channels[1], request) == "miss"
        async with asyncio.timeout(60):
            while (await purge(channels[0], model="mlp")).confirmed < 2:  # until it has found Redis again
                pass
