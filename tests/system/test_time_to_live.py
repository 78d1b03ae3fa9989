"""Answers of models that say how long they are fresh, and how long a stale one may be given."""

import asyncio
import contextlib
import signal
import time

import grpc
import pytest
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc

from tests import models
from tests.system.callers import eventually
from tests.system.test_cache import INFER, computed, fresh, infer
from tests.valkeys import valkey_server


def asked(model):
    request = fresh()
    request.model_name = model
    return request


async def told(channel, request, metadata=()):
    """(outcome, whether it is stale)"""
    trailing = (await infer(channel, request, metadata))[1]
    return trailing["ringmesh-cache"], "ringmesh-stale" in trailing


@pytest.fixture
def repository(tmp_path):
    models.expiring(tmp_path, ttl=0.2, stale=60, name="stale")
    models.expiring(tmp_path, ttl=0.2, name="short")
    return tmp_path


@pytest.fixture
def worker(start_worker, repository):
    return start_worker("worker", models=repository)


@pytest.fixture
async def channel(start_router, worker):
    router = await asyncio.to_thread(start_router, [worker.address], None, audit_share=0)
    async with grpc.aio.insecure_channel(router.address) as channel:
        yield channel


@contextlib.contextmanager
def paused(worker):
    worker.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.process.send_signal(signal.SIGCONT)


async def test_a_stale_answer_is_given_and_marked_while_it_is_renewed_and_never_after_a_purge(channel, worker):
    request = asked("stale")
    assert await told(channel, request) == ("miss", False)
    start = time.monotonic()
    with paused(worker):
        while (answer := await told(channel, request)) == ("hit-local", False):
            pass
        assert answer == ("hit-local", True)
        # HTTP's max-age takes nothing stale, though it is young enough.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(channel, request, [("cache-control", "only-if-cached, max-age=60")])
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        for _ in range(50):
            assert await told(channel, request) == ("hit-local", True)
    while (answer := await told(channel, request)) == ("hit-local", True):
        pass
    assert answer == ("hit-local", False)
    # On a slow machine the renewed answer may be old, and renewed, too; or the worker taken for dead, and asked again.
    assert 2 <= await computed(channel, "stale") <= 2 + (time.monotonic() - start) / 0.2
    with paused(worker):
        while await told(channel, request) == ("hit-local", False):
            pass
        await cache_pb2_grpc.CacheServiceStub(channel).Purge(cache_pb2.PurgeRequest(model="stale"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(INFER)(request.SerializeToString(), timeout=0.3)
        # The second where the router has found by now that the worker hangs.
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


async def test_without_a_time_for_stale_answers_an_old_one_is_computed_anew(channel, worker):
    request = asked("short")
    assert await told(channel, request) == ("miss", False)
    with paused(worker):
        infer_now = channel.unary_unary(INFER)
        async with asyncio.timeout(60):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while True:
                    await infer_now(request.SerializeToString(), timeout=0.3)

    async def is_computed_anew():
        with contextlib.suppress(grpc.aio.AioRpcError):  # until the router hears the worker again
            outcome, is_stale = await told(channel, request)
            assert not is_stale
            return outcome == "miss"

    # An answer that the paused worker had begun for a caller who has left may be there first.
    await eventually(is_computed_anew)
    assert await computed(channel, "short") >= 2


@pytest.mark.proof
async def test_three_routers_under_load_renew_an_answer_once_for_the_fleet(start_router, worker):
    """The first caller at each router waits; nobody else does, and there is one computation for each time to live."""
    request = asked("stale").SerializeToString()
    with valkey_server() as valkey:
        routers = [
            await asyncio.to_thread(start_router, [worker.address], valkey.connection_url, audit_share=0)
            for _ in range(3)
        ]
        async with contextlib.AsyncExitStack() as opened:
            channels = [await opened.enter_async_context(grpc.aio.insecure_channel(r.address)) for r in routers]
            for channel in channels:  # each has the answer from here on, though Redis may be slow
                await channel.unary_unary(INFER)(request, timeout=60)
            before = await computed(channels[0], "stale")
            outcomes = {}
            start = time.monotonic()

            async def call(channel):
                while time.monotonic() < start + 6:
                    call = channel.unary_unary(INFER)(request, timeout=60)
                    await call
                    outcome = dict(await call.trailing_metadata())["ringmesh-cache"]
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1

            await asyncio.gather(*(call(channel) for channel in channels * 4))
            lives = (time.monotonic() - start) / 0.2
            count = await computed(channels[0], "stale") - before
            print(outcomes, lives, count)
            assert outcomes.keys() == {"hit-local"}
            # Nearly each is renewed once; each router by itself would make three of each.
            assert 0 < count <= 2 * lives + 3
