"""Killed, frozen and missing parts, under load: nothing is lost."""

import asyncio
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.system.callers import eventually, sixteen
from tests.system.processes import free_address
from tests.system.test_cache import INFER, fresh, infer
from tests.system.test_metrics import scrape, value
from tests.valkeys import valkey_server


@pytest.fixture
def workers(start_worker):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(start_worker, ("worker-a", "worker-b")))


@pytest.fixture
def router(start_router, workers):
    return start_router([worker.address for worker in workers], None).address


async def test_killed_worker_loses_no_request_and_has_its_keys_again_when_it_is_back(router, workers, start_worker):
    async with sixteen(router) as callers:
        await callers.answered_by("worker-a", "worker-b")
        workers[0].process.kill()
        await callers.answered_by("worker-b")
        await asyncio.to_thread(start_worker, "worker-a", address=workers[0].address)
        await callers.answered_by("worker-a", "worker-b")
    assert callers.errors == []


async def test_frozen_worker_loses_no_request(router, workers):
    async with sixteen(router) as callers:
        await callers.answered_by("worker-a", "worker-b")
        workers[0].process.send_signal(signal.SIGSTOP)
        await callers.answered_by("worker-b")
    assert callers.errors == []


@pytest.mark.proof
@pytest.mark.alone
@pytest.mark.both_engines
async def test_a_worker_that_is_stopped_under_load_keeps_nobody_waiting_beyond_the_time_it_takes_to_be_found(
    router, workers
):
    took = []

    async def call(channel):
        begin = time.monotonic()
        # To find it takes 2 s.
        await channel.unary_unary(INFER)(fresh().SerializeToString(), timeout=20)
        took.append(time.monotonic() - begin)

    async with grpc.aio.insecure_channel(router) as channel:
        await asyncio.gather(*(call(channel) for _ in range(100)))
        workers[0].process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(10):
                await asyncio.gather(*(call(channel) for _ in range(300)))
        finally:
            workers[0].process.send_signal(signal.SIGCONT)
    late = sorted(took)[-300:]
    print(f"\nSIGSTOP, 3000 requests: slowest {late[-1]:.2f} s, {sum(each > 0.5 for each in late)} above 0.5 s")


@pytest.mark.both_engines
async def test_drained_worker_loses_no_request_and_exits_with_0(router, workers):
    async with sixteen(router) as callers:
        await callers.answered_by("worker-a", "worker-b")
        workers[0].process.send_signal(signal.SIGTERM)
        await callers.answered_by("worker-b")
    assert callers.errors == []
    assert workers[0].process.wait(60) == 0


async def test_without_a_worker_callers_are_told_unavailable_at_once(start_router, start_worker):
    worker = start_worker("worker-a")
    router = start_router([worker.address], None).address
    worker.process.kill()
    worker.process.wait()
    async with grpc.aio.insecure_channel(router) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel, fresh())
        # Long before the deadline, which has a code of its own.
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "mlp" in caught.value.details()


async def test_redis_killed_under_load_fails_no_request_and_is_used_again(start_router, stack, valkey):
    router = start_router(stack.workers, valkey.connection_url).address
    async with sixteen(router) as callers:
        await callers.more()
        valkey._process.kill()
        valkey._process.wait()
        await callers.more(500)
    assert callers.errors == []
    with valkey_server(valkey.port) as again:
        async with grpc.aio.insecure_channel(router) as channel:

            async def filled():
                await infer(channel, fresh())
                return again.client().dbsize() > 0

            await eventually(filled)


async def test_redis_frozen_under_load_fails_no_request(start_router, stack, valkey):
    router = start_router(stack.workers, valkey.connection_url, shared_budget_seconds=0.05).address
    async with sixteen(router) as callers:
        await callers.more()
        valkey._process.send_signal(signal.SIGSTOP)
        await callers.more(500)
    valkey._process.send_signal(signal.SIGCONT)
    assert callers.errors == []


@pytest.mark.proof
@pytest.mark.alone
async def test_a_hung_redis_costs_callers_one_look_up_budget_and_then_nothing(start_router, stack, valkey):
    """Sixteen callers at once, then one after the other: none waits after the breaker has opened."""
    budget = 6.0
    router = start_router(stack.workers, valkey.connection_url, shared_budget_seconds=budget).address

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


async def test_redis_that_was_never_there_fails_no_request(start_router, stack):
    async with sixteen(start_router(stack.workers, "redis://127.0.0.1:1").address) as callers:
        await callers.more()
    assert callers.errors == []


@pytest.mark.both_engines
async def test_a_caller_that_cancels_leaves_the_others_alone(stack):
    async with grpc.aio.insecure_channel(stack.router) as channel:
        request = fresh("slow")
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        leaver = method(request.SerializeToString(), timeout=20)
        stayer = asyncio.create_task(infer(channel, request))
        await asyncio.sleep(0.1)
        leaver.cancel()
        _, told = await stayer
        assert told["ringmesh-cache"] in ("joined", "miss")


@pytest.mark.both_engines
async def test_a_router_told_to_stop_finishes_what_it_has(start_router, stack):
    metrics = free_address()
    router = start_router(stack.workers, None, metrics_address=metrics)

    async def is_under_way():
        return value(await asyncio.to_thread(scrape, metrics), "ringmesh_requests_in_flight") > 0

    async with grpc.aio.insecure_channel(router.address) as channel:
        answer = asyncio.create_task(infer(channel, fresh("slow")))
        await eventually(is_under_way)
        router.process.send_signal(signal.SIGTERM)
        response, _ = await answer
        assert response.model_name == "slow"
    assert router.process.wait(60) == 0
