"""What the simulated parts do while a process is dead, or Redis is silent."""

import asyncio
import random
from types import SimpleNamespace

import grpc
import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.runtime.rpc.rpc import Failure
from tests.simulation.calls import Call
from tests.simulation.clock import clock
from tests.simulation.loop import Process, SimLoop
from tests.simulation.network import Network, _Connection
from tests.simulation.redis import Redis


@pytest.fixture
def loop():
    made = SimLoop(lambda *_: None)
    yield made
    made.abandon()


def run(loop, seconds):
    loop.run(clock.now_ns + int(seconds * 1e9))


def test_a_killed_process_runs_no_code(loop):
    process, ran = Process(loop, "router-0"), []

    async def work():
        try:
            await asyncio.sleep(1)
            await loop.run_in_executor(None, ran.append, "thread")
        finally:
            ran.append("ended")

    process.spawn(work())
    run(loop, 0.5)
    process.kill()
    run(loop, 2)
    assert ran == []


def test_a_killed_process_does_not_answer_its_callers(loop):
    told = []
    process = Process(loop, "router-0")
    world = SimpleNamespace(
        loop=loop, random=random.Random(0), trace=lambda *_: None, judge=told.append, violated=told.append
    )
    call = Call(world, 0, SimpleNamespace(process=process, name="router-0", fleet=()), "plain", [[0, 0, 0, 0]])
    call.send()
    process.kill()
    call.answered_by_router(Failure(grpc.StatusCode.INTERNAL, "no running event loop", ()))
    assert (call.code, call.lost, told) == ("", True, [])


def test_a_killed_process_sends_nothing(loop):
    network = Network(loop, random.Random(0), lambda *_: None)
    router, worker, told = Process(loop, "router-0"), Process(loop, "worker-0"), []
    way = network.way("router-0", "10.0.0.1:8100")
    connection = _Connection(way, router, SimpleNamespace(process=worker))
    connection.lost = told.append
    worker.kill()
    way.deliver(worker, connection, told.append, "an answer")
    run(loop, 1)
    assert told == [connection]


def test_a_client_gives_up_a_silent_redis_after_its_timeout(loop):
    redis = Redis(loop, random.Random(0), lambda *_: None)
    process = Process(loop, "router-0")
    client = process.context.run(redis.client, {"socket_timeout": 1.0})
    redis.hangs = True
    task = process.spawn(client.get("key"))
    run(loop, 0.9)
    assert not task.done()
    run(loop, 0.2)
    assert isinstance(task.exception(), RedisTimeoutError)
