"""Subscribers to fleet events that do not read: they cost the router nothing, and are told that they missed some."""

import asyncio
import os
import time

import grpc
import pytest
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from router.membership.events import MAX_WAITING, Event
from router.membership.fleet import Fleet
from router.operator.service import OperatorService
from services.runtime.rpc.server import Engine, Server
from tests.unit.router.fleets import member

pytestmark = [pytest.mark.proof, pytest.mark.both_engines]

# More than the threads that asyncio has for what blocks.
STUCK = (os.cpu_count() or 1) + 6
BLOCK = 1000


@pytest.fixture
async def fleet():
    made = Fleet([], lambda ready: None, clock=time.monotonic)
    yield made
    made.close()


@pytest.fixture
async def server(engine, fleet):
    service = OperatorService(fleet, None, None).service()
    made = Server(Engine(engine), "127.0.0.1:0", [service], max_message_bytes=1 << 20, max_connection_age=600)
    made.port = await made.start()
    yield made
    await made.stop(0)


@pytest.fixture
async def stubs(server):
    # Each on a connection of its own, which takes little beyond what is read.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) for _ in range(STUCK + 1)]
    yield [router_pb2_grpc.RouterServiceStub(channel) for channel in channels]
    for channel in channels:
        await channel.close()


async def next_event(call):
    """None where the call has ended with an error."""
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return None


async def subscribe(fleet, stub):
    """A subscriber that has heard one event."""
    call = stub.Watch(router_pb2.WatchRequest(), timeout=300)
    reading = asyncio.ensure_future(call.read())
    async with asyncio.timeout(300):
        while not reading.done():
            fleet.events.publish(Event.KIND_JOINED, member("first"))
            await asyncio.sleep(0.01)
    return call


async def test_a_subscriber_that_does_not_read_is_told_that_it_missed_events_and_holds_up_nothing(server, fleet, stubs):
    stuck = [await subscribe(fleet, stub) for stub in stubs[:STUCK]]
    reads = await subscribe(fleet, stubs[STUCK])
    waiting = lambda: [queue.qsize() for queue in fleet.events._watchers]  # noqa: E731
    told = 0
    async with asyncio.timeout(300):
        while sorted(waiting())[1] < MAX_WAITING:
            for number in range(told, told + BLOCK):
                fleet.events.publish(Event.KIND_JOINED, member(f"worker-{number}", worker_id="x" * 200))
            told += BLOCK
            while (await reads.read()).address != f"worker-{told - 1}":
                pass
    assert max(waiting()) <= MAX_WAITING + 1
    # What is done on threads, such as the building of a ring.
    await asyncio.wait_for(asyncio.to_thread(time.monotonic), 300)
    while await next_event(stuck[0]) is not None:
        pass
    assert await stuck[0].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "events behind; watch again" in await stuck[0].details()
    # The others still do not read.
    fleet.events.close()
    await asyncio.wait_for(server.stop(1), 300)
