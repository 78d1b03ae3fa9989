"""Lanes of the native engine: answers given on its receiving thread, beside the event loop."""

import asyncio
import time
from functools import partial

import grpc
import pytest

from services.runtime.oip.protocol import lane_handler
from services.runtime.rpc.fast_lane import FastLaneServer
from services.runtime.rpc.rpc import Answer, Lane

NAME = "test.Lanes"


async def serve(admit, finish=None, start=None):
    """The server and a channel to it."""
    lane = Lane(admit, finish, start)
    server = FastLaneServer([], {f"/{NAME}/Call": lane})
    handlers = {"Call": lane_handler(lane)}
    server.add_registered_method_handlers(NAME, handlers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.insecure_channel(f"127.0.0.1:{port}")


async def test_a_lane_answers_while_the_event_loop_is_held_up():
    done = []
    server, channel = await serve(lambda data, _: Answer(b"at once " + data, (), lambda: done.append(data)))
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"warm", timeout=10) == b"at once warm"
        answer = call.future(b"x", timeout=10)
        end = time.monotonic() + 10
        while not answer.done() and time.monotonic() < end:
            time.sleep(0.001)  # noqa: ASYNC251, holds up the event loop
        assert answer.result(0) == b"at once x"
        assert b"x" not in done
        async with asyncio.timeout(10):
            while done != [b"warm", b"x"]:  # told to the event loop, which then does it
                await asyncio.sleep(0.001)
    await server.stop(0)


async def test_what_is_not_answered_at_once_is_finished_on_the_event_loop():
    loop = asyncio.get_running_loop()

    async def finish(call, deadline):
        assert asyncio.get_running_loop() is loop
        return Answer(call + b" %d" % round((deadline - time.monotonic()) / 1000), (("told", "so"),))

    server, channel = await serve(lambda data, _: data.upper(), finish)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").with_call
        answer, told = await asyncio.to_thread(call, b"x", timeout=20_000)
        assert answer == b"X 20"
        assert ("told", "so") in told.trailing_metadata()
    await server.stop(0)


async def test_a_caller_that_leaves_cancels_what_is_being_finished():
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def finish(call, deadline):
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    server, channel = await serve(lambda data, _: data, finish)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").future(b"x", timeout=60)
        await asyncio.wait_for(begun.wait(), 10)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
    await server.stop(0)


async def test_a_caller_that_leaves_before_anything_is_begun_leaves_nothing_behind():
    async def finish(call, deadline):
        await asyncio.sleep(60)

    server, channel = await serve(lambda data, _: data, finish)
    with channel:
        await asyncio.to_thread(grpc.channel_ready_future(channel).result, 10)
        call = channel.unary_unary(f"/{NAME}/Call").future(b"x", timeout=60)
        time.sleep(0.2)  # noqa: ASYNC251, both come in one turn of the event loop
        call.cancel()
        time.sleep(0.2)  # noqa: ASYNC251
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert server._under_way == {}
    await server.stop(0)


class Grace:
    """A drain's, which ends when the test says so."""

    SECONDS = 1000.0

    def __init__(self, monkeypatch):
        loop = asyncio.get_running_loop()
        self._call_later = loop.call_later
        self.end = None
        monkeypatch.setattr(loop, "call_later", self._caught)

    def _caught(self, seconds, call, *arguments, **options):
        if seconds == self.SECONDS:
            self.end = partial(call, *arguments)
        return self._call_later(seconds, call, *arguments, **options)

    async def begin(self, server):
        stopping = asyncio.create_task(server.stop(self.SECONDS))
        while self.end is None:
            await asyncio.sleep(0)
        return stopping


@pytest.fixture
async def grace(monkeypatch):
    return Grace(monkeypatch)


async def test_a_drain_waits_for_what_is_being_finished_and_ends_the_rest(grace):
    begun, is_over = [], asyncio.Event()

    async def finish(call, deadline):
        begun.append(call)
        await (is_over.wait() if call == b"quick" else asyncio.sleep(600))
        return Answer(b"finished", ())

    server, channel = await serve(lambda data, _: data, finish)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        quick, slow = (call.future(data, timeout=600) for data in (b"quick", b"slow"))
        async with asyncio.timeout(60):
            while len(begun) < 2:
                await asyncio.sleep(0.001)
        stopping = await grace.begin(server)
        is_over.set()
        assert await asyncio.to_thread(quick.result, 60) == b"finished"
        assert not slow.done()
        grace.end()
        await stopping
        error = await asyncio.to_thread(slow.exception, 60)
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_lane_that_fails_fails_that_call_alone():
    def lane(data, _):
        if data == b"bad":
            raise ValueError("secret")
        return Answer(data, ())

    server, channel = await serve(lane)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, b"bad", timeout=10)
        assert failed.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in failed.value.details()
        assert await asyncio.to_thread(call, b"good", timeout=10) == b"good"
    await server.stop(0)


async def test_a_draining_server_turns_calls_away_from_its_lanes_too():
    server, channel = await serve(lambda data, _: Answer(data, ()))
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"x", timeout=10) == b"x"
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0)
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, b"x", timeout=10)
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        await stopping


async def test_what_is_started_is_answered_later_or_at_once_and_the_rest_is_finished():
    loop = asyncio.get_running_loop()

    def start(call, deadline, answer):
        if call == b"finish":
            return None
        if call == b"later":
            loop.call_later(0.05, answer, Answer(b"started %d" % round((deadline - time.monotonic()) / 1000), ()))
        else:
            answer(Answer(b"at once", ()))
        return lambda: None

    async def finish(call, deadline):
        return Answer(b"finished", ())

    server, channel = await serve(lambda data, _: data, finish, start)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        answers = [call.future(data, timeout=20_000) for data in (b"later", b"now", b"finish")]
        told = await asyncio.to_thread(lambda: [answer.result(60) for answer in answers])
        assert told == [b"started 20", b"at once", b"finished"]
        assert server._under_way == {}
    await server.stop(0)


async def test_a_caller_that_leaves_cancels_what_was_started():
    begun, cancelled = asyncio.Event(), asyncio.Event()

    def start(call, deadline, answer):
        begun.set()
        return cancelled.set

    server, channel = await serve(lambda data, _: data, None, start)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").future(b"x", timeout=60)
        await asyncio.wait_for(begun.wait(), 10)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
    await server.stop(0)


async def test_a_drain_waits_for_what_was_started_and_ends_the_rest(grace):
    started, cancelled = {}, []

    def start(call, deadline, answer):
        started[call] = answer
        return lambda: cancelled.append(call)

    server, channel = await serve(lambda data, _: data, None, start)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        quick, slow = (call.future(data, timeout=600) for data in (b"quick", b"slow"))
        async with asyncio.timeout(60):
            while len(started) < 2:
                await asyncio.sleep(0.001)
        stopping = await grace.begin(server)
        started[b"quick"](Answer(b"done", ()))
        assert await asyncio.to_thread(quick.result, 60) == b"done"
        assert not slow.done()
        grace.end()
        await stopping
        error = await asyncio.to_thread(slow.exception, 60)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert cancelled == [b"slow"]


async def test_a_start_that_fails_fails_that_call_alone():
    def start(call, deadline, answer):
        if call == b"bad":
            raise ValueError("secret")
        answer(Answer(call, ()))
        return lambda: None

    server, channel = await serve(lambda data, _: data, None, start)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        error = await asyncio.to_thread(call.future(b"bad", timeout=10).exception, 10)
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert await asyncio.to_thread(call, b"good", timeout=10) == b"good"
    await server.stop(0)
