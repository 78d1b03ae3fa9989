"""Workers that come, go and change: routers find them, and go on with what they know where Redis is lost."""

import asyncio
import contextlib
import threading
import time

import grpc
import pytest
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from services.runtime.redis.discovery import ADDRESSES, key
from tests.system.conftest import eventually
from tests.system.redis_servers import needs_redis_server, redis_cluster, start_redis  # noqa: F401
from tests.system.test_cache import fresh, infer
from tests.valkeys import valkey_server

Kind = router_pb2.WatchResponse.Kind


class Watcher:
    """Keeps the events that a router tells."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        self.stub = router_pb2_grpc.RouterServiceStub(self.channel)
        self._call = self.stub.Watch(router_pb2.WatchRequest(), wait_for_ready=True)
        self.events = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(grpc.RpcError):
            self.events.extend(self._call)

    def kinds(self, worker_address):
        return [Kind.Name(event.kind)[5:] for event in list(self.events) if event.address == worker_address]

    def healthy(self):
        ring = self.stub.GetRing(router_pb2.GetRingRequest(), timeout=60)
        return {worker.address for worker in ring.workers if worker.healthy}

    def members(self):
        return {worker.address for worker in self.stub.GetRing(router_pb2.GetRingRequest(), timeout=60).workers}

    def close(self):
        self._call.cancel()
        self.channel.close()


@pytest.fixture
def watch():
    watchers = []

    def start(address):
        watchers.append(Watcher(address))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.close()


async def test_announced_worker_is_found_and_forgotten_when_it_stops(start_worker, start_router, valkey, watch):
    first = start_worker("first", discovery_url=valkey.connection_url)
    router = start_router([], None, discovery_url=valkey.connection_url)
    watcher = watch(router.address)
    eventually(lambda: watcher.healthy() == {first.address})
    second = start_worker("second", discovery_url=valkey.connection_url, weight=3)
    eventually(lambda: watcher.healthy() == {first.address, second.address})
    ring = watcher.stub.GetRing(router_pb2.GetRingRequest())
    assert {worker.id: worker.share for worker in ring.workers} == pytest.approx(
        {"first": 0.25, "second": 0.75}, abs=0.05
    )
    async with grpc.aio.insecure_channel(router.address) as channel:
        told = set()
        async with asyncio.timeout(60):
            while told != {"first", "second"}:
                told.add((await infer(channel, fresh()))[1]["ringmesh-worker"])
    second.process.terminate()
    assert second.process.wait(60) == 0
    eventually(lambda: watcher.members() == {first.address})
    eventually(lambda: watcher.kinds(second.address)[-1] == "LEFT")
    kinds = watcher.kinds(second.address)
    assert kinds[0] == "JOINED"
    assert "MODEL_GAINED" in kinds
    assert not valkey.client().exists(key(second.address))


@pytest.mark.proof
async def test_killed_worker_leaves_when_its_announcement_expires(start_worker, start_router, valkey, watch):
    stays, dies = (start_worker(name, discovery_url=valkey.connection_url) for name in ("stays", "dies"))
    router = start_router([], None, discovery_url=valkey.connection_url)
    watcher = watch(router.address)
    eventually(lambda: watcher.healthy() == {stays.address, dies.address})
    # The watch has begun: it tells what comes.
    eventually(lambda: "MODEL_GAINED" in watcher.kinds(dies.address))
    dies.process.kill()
    eventually(lambda: watcher.members() == {stays.address})
    eventually(lambda: watcher.kinds(dies.address)[-2:] == ["EJECTED", "LEFT"])


@pytest.mark.proof
async def test_routers_go_on_without_redis_and_find_again_what_is_there(start_worker, start_router, valkey, watch):
    workers = [start_worker(name, discovery_url=valkey.connection_url) for name in ("a", "b")]
    router = start_router([], None, discovery_url=valkey.connection_url)
    watcher = watch(router.address)
    addresses = {worker.address for worker in workers}
    eventually(lambda: watcher.healthy() == addresses)
    valkey._process.kill()
    valkey._process.wait()
    async with grpc.aio.insecure_channel(router.address) as channel:
        for _ in range(20):
            await infer(channel, fresh())
        # It checks them itself.
        workers[0].process.kill()
        eventually(lambda: watcher.healthy() == {workers[1].address})
        await infer(channel, fresh())
    assert watcher.members() == addresses
    with valkey_server(valkey.port) as again:
        eventually(lambda: again.client().exists(key(workers[1].address)))
        eventually(lambda: watcher.members() == {workers[1].address})


@pytest.mark.proof
async def test_what_is_no_announcement_is_ignored(start_worker, start_router, valkey, watch):
    client = valkey.client()
    client.sadd(ADDRESSES, "nonsense", "nowhere:1")
    client.set(key("nonsense"), b"\xff\xff")
    worker = start_worker("worker", discovery_url=valkey.connection_url)
    router = start_router([], None, discovery_url=valkey.connection_url)
    watcher = watch(router.address)
    eventually(lambda: watcher.members() == {worker.address})


@pytest.mark.proof
async def test_workers_behind_a_name_are_found(start_worker, start_router, watch):
    worker = start_worker("worker")
    port = worker.address.rpartition(":")[2]
    router = start_router([f"dns://localhost:{port}"], None)
    eventually(lambda: f"127.0.0.1:{port}" in watch(router.address).healthy())


@pytest.mark.proof
async def test_changes_reach_two_routers_in_the_order_they_happened(start_worker, start_router, valkey, watch):
    stays = start_worker("stays", discovery_url=valkey.connection_url)
    routers = [start_router([], None, discovery_url=valkey.connection_url) for _ in range(2)]
    watchers = [watch(router.address) for router in routers]
    for watcher in watchers:
        eventually(lambda watcher=watcher: watcher.healthy() == {stays.address})
    comes = start_worker("comes", discovery_url=valkey.connection_url)
    begin = time.time()
    for watcher in watchers:
        eventually(lambda watcher=watcher: comes.address in watcher.healthy())
    print(f"known {after(begin, watchers, comes, Kind.KIND_JOINED)} s after the worker said that it serves")
    begin = time.time()
    comes.process.terminate()
    for watcher in watchers:
        eventually(lambda watcher=watcher: watcher.members() == {stays.address})
    print(f"gone {after(begin, watchers, comes, Kind.KIND_LEFT)} s after it was told to stop")
    for watcher in watchers:
        # Drained in between, or already not to be reached.
        seen = [kind for kind in watcher.kinds(comes.address) if kind != "MODEL_GAINED"]
        assert (seen[0], seen[1], seen[-1]) == ("JOINED", "RESTORED", "LEFT")
        ring = watcher.stub.GetRing(router_pb2.GetRingRequest())
        assert [(worker.id, worker.share) for worker in ring.workers] == [("stays", 1.0)]


def after(begin, watchers, worker, kind):
    """Seconds until each router told it."""

    def told(watcher):
        return [event.at_ms for event in watcher.events if (event.address, event.kind) == (worker.address, kind)]

    eventually(lambda: all(told(watcher) for watcher in watchers))
    return [round(told(watcher)[0] / 1000 - begin, 3) for watcher in watchers]


@pytest.mark.proof
@needs_redis_server
async def test_workers_are_found_in_a_redis_cluster_and_a_primary_that_dies_loses_none(
    start_worker,
    start_router,
    redis_cluster,  # noqa: F811
    watch,
):
    first = start_worker("first", discovery_url=redis_cluster.url)
    router = start_router([], None, discovery_url=redis_cluster.url)
    watcher = watch(router.address)
    eventually(lambda: watcher.healthy() == {first.address})
    (primary,) = [server for server in redis_cluster.primaries() if server.cli("keys", "{rm:fleet}*")]
    redis_cluster.be_quick_to_fail_over()
    primary.kill()
    second = start_worker("second", discovery_url=redis_cluster.url)
    eventually(lambda: watcher.healthy() == {first.address, second.address})
    assert "LEFT" not in watcher.kinds(first.address)


@pytest.mark.proof
@needs_redis_server
async def test_workers_are_found_at_the_primary_that_sentinels_name(
    start_worker,
    start_router,
    start_redis,  # noqa: F811
    watch,
):
    primary = start_redis()
    primary.wait()
    sentinel = start_redis(f"sentinel monitor fleet 127.0.0.1 {primary.port} 1", sentinel=True)
    sentinel.wait()
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/fleet"
    worker = start_worker("first", discovery_url=url)
    router = start_router([], None, discovery_url=url)
    watcher = watch(router.address)
    eventually(lambda: watcher.healthy() == {worker.address})
    worker.process.terminate()
    assert worker.process.wait(60) == 0
    eventually(lambda: watcher.members() == set())
    assert primary.cli("smembers", ADDRESSES) == ""
