"""Fast paths of the native engine: coroutines without a task."""

import asyncio
import socket
import struct
import time
from functools import partial

import grpc
import pytest

from services.runtime.driver import ON_LOOP
from services.runtime.errors import ResourceExhaustedError
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc import http2_connection, native_server
from services.runtime.rpc.http2_frames import DATA, END_STREAM, INITIAL_WINDOW_SIZE, RST_STREAM, WINDOW_UPDATE
from services.runtime.rpc.native_server import NativeServer
from services.runtime.rpc.rpc import Answer
from tests.system.raw_http2 import EMPTY, RawClient, frame

NAME = "test.FastPaths"
CALL = [
    (":method", "POST"), (":scheme", "http"), (":authority", "x"), ("content-type", "application/grpc"),
    ("te", "trailers"),
]  # fmt: skip


async def serve(path):
    """The server of one fast path and a channel to it."""
    server = NativeServer({f"/{NAME}/Call": path}, 4 << 20)
    handlers = {"Call": fast_path_handler(path)}
    server.add_registered_method_handlers(NAME, handlers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.insecure_channel(f"127.0.0.1:{port}")


async def echo(data, metadata, deadline):
    return Answer(data, ())


async def test_what_follows_an_answer_is_done_after_it_was_sent():
    done = []

    async def path(data, metadata, deadline):
        return Answer(b"at once " + data, (), lambda: done.append(data))

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        for data in (b"x", b"y"):
            assert await asyncio.to_thread(call, data, timeout=60) == b"at once " + data
        async with asyncio.timeout(60):
            while done != [b"x", b"y"]:
                await asyncio.sleep(0.001)
    await server.stop(0)


async def test_what_is_not_answered_at_once_continues_on_the_event_loop():
    loop = asyncio.get_running_loop()

    async def path(data, metadata, deadline):
        await ON_LOOP
        assert asyncio.get_running_loop() is loop
        if data == b"later":
            await asyncio.sleep(0)
        return Answer(data + b" %d" % round((deadline - time.monotonic()) / 1000), (("told", "so"),))

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").with_call
        for data in (b"later", b"now"):
            answer, told = await asyncio.to_thread(call, data, timeout=20_000)
            assert answer == data + b" 20"
            assert ("told", "so") in told.trailing_metadata()
        assert not server._under_way
    await server.stop(0)


async def test_a_caller_that_leaves_cancels_its_call():
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def path(data, metadata, deadline):
        await ON_LOOP
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").future(b"x", timeout=60)
        await asyncio.wait_for(begun.wait(), 60)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 60)
        assert not server._under_way
    await server.stop(0)


async def test_at_its_deadline_a_call_is_ended():
    async def path(data, metadata, deadline):
        await ON_LOOP
        await asyncio.get_running_loop().create_future()

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call").future(b"x", timeout=0.2)
        error = await asyncio.to_thread(call.exception, 60)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(60):
            while server._under_way:
                await asyncio.sleep(0.001)
    await server.stop(0)


async def test_a_caller_that_leaves_in_the_chunk_of_its_request_leaves_nothing_behind():
    released = []

    async def path(data, metadata, deadline):
        try:
            await ON_LOOP
            await asyncio.get_running_loop().create_future()
        finally:
            released.append(data)

    server, channel = await serve(path)
    channel.close()
    with RawClient(server._sockets[0].getsockname()[1]) as client:
        for stream in (1, 3):
            client.call(stream, [(":path", f"/{NAME}/Call"), *CALL])
        client.send(frame(RST_STREAM, 0, 1, struct.pack(">I", 8)))  # as the two calls, before the event loop reads
        async with asyncio.timeout(60):
            while len(server._under_way) != 1 or len(released) != 1:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        while server._under_way:
            await asyncio.sleep(0.01)
    assert len(released) == 2
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


async def test_a_drain_waits_for_what_is_under_way_and_ends_the_rest(grace):
    begun, cancelled, is_over = [], [], asyncio.Event()

    async def path(data, metadata, deadline):
        await ON_LOOP
        begun.append(data)
        try:
            await (is_over.wait() if data == b"quick" else asyncio.get_running_loop().create_future())
        except asyncio.CancelledError:
            cancelled.append(data)
            raise
        return Answer(b"done", ())

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        quick, slow = (call.future(data, timeout=600) for data in (b"quick", b"slow"))
        async with asyncio.timeout(60):
            while len(begun) < 2:
                await asyncio.sleep(0.001)
        stopping = await grace.begin(server)
        is_over.set()
        assert await asyncio.to_thread(quick.result, 60) == b"done"
        assert not slow.done()
        grace.end()
        await stopping
        error = await asyncio.to_thread(slow.exception, 60)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert cancelled == [b"slow"]


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def raw_client(server, *settings):
    return RawClient(server._sockets[0].getsockname()[1], settings)


async def test_a_draining_server_answers_a_call_whose_request_is_on_its_way():
    server, channel = await serve(echo)
    channel.close()
    with raw_client(server) as client:
        client.headers(1, [(":path", f"/{NAME}/Call"), *CALL])
        client.send(frame(DATA, 0, 1, EMPTY[:2]))
        await until(lambda: any(connection._streams for connection in server._connections))
        stopping = asyncio.create_task(server.stop(60))
        await until(lambda: server.max_streams == 0)
        client.send(frame(DATA, END_STREAM, 1, EMPTY[2:]))
        assert await asyncio.to_thread(client.outcome, 1) == 0
        await stopping


async def test_a_draining_server_waits_for_the_readers_of_its_answers(monkeypatch):
    monkeypatch.setattr(native_server, "_FLUSH_SECONDS", 0.0)
    server, channel = await serve(echo)
    channel.close()
    with raw_client(server, (INITIAL_WINDOW_SIZE, 0)) as client:
        client.call(1, [(":path", f"/{NAME}/Call"), *CALL])
        await until(lambda: any(connection._blocked for connection in server._connections))
        stopping = asyncio.create_task(server.stop(60))
        for _ in range(20):
            await asyncio.sleep(0)
        assert server.max_streams == 0
        client.send(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", len(EMPTY))))
        assert await asyncio.to_thread(client.outcome, 1) == 0
        await stopping


async def test_what_a_client_sends_as_it_reads_its_last_answer_does_not_lose_that():
    async def path(data, metadata, deadline):
        return Answer(bytes(400_000), ())

    server, channel = await serve(path)
    channel.close()
    with raw_client(server, (INITIAL_WINDOW_SIZE, 1 << 20)) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        client.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 20)))
        client.call(1, [(":path", f"/{NAME}/Call"), *CALL])
        await until(lambda: any(connection.sent > 400_000 for connection in server._connections))
        stopping = asyncio.create_task(server.stop(60))
        await until(lambda: all(connection._is_closing for connection in server._connections))
        for _ in range(2):
            client.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))
        assert await asyncio.to_thread(client.outcome, 1) == 0
    await stopping


async def test_a_draining_server_does_not_begin_another_call(grace):
    is_over = asyncio.Event()

    async def path(data, metadata, deadline):
        await ON_LOOP
        await is_over.wait()
        return Answer(data, ())

    server, channel = await serve(path)
    channel.close()
    with raw_client(server) as client:
        client.call(1, [(":path", f"/{NAME}/Call"), *CALL])
        await until(lambda: server._under_way)
        stopping = await grace.begin(server)
        client.call(3, [(":path", f"/{NAME}/Call"), *CALL])
        refused = await asyncio.to_thread(client.until, lambda got: got.kind == RST_STREAM)
        assert (refused.stream, refused.payload) == (3, struct.pack(">I", 7))  # REFUSED_STREAM
        is_over.set()
        assert await asyncio.to_thread(client.outcome, 1) == 0
        await stopping


async def test_a_client_that_has_left_and_reads_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(http2_connection, "_CLOSE_SECONDS", 0.0)

    async def path(data, metadata, deadline):
        return Answer(bytes(64 << 20), ())

    server, channel = await serve(path)
    channel.close()
    with raw_client(server, (INITIAL_WINDOW_SIZE, 2**31 - 1)) as client:
        client.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30)))
        client.call(1, [(":path", f"/{NAME}/Call"), *CALL])
        await until(lambda: any(connection._is_paused for connection in server._connections))
        client.socket.shutdown(socket.SHUT_WR)
        await until(lambda: not server._connections)
    await server.stop(0)


@pytest.mark.parametrize("where", ["received", "event loop"])
async def test_a_path_that_fails_fails_that_call_alone(where):
    async def path(data, metadata, deadline):
        if where == "event loop":
            await ON_LOOP
        if data == b"bad":
            raise ValueError("secret")
        if data == b"full":
            raise ResourceExhaustedError("too much")
        return Answer(data, ())

    server, channel = await serve(path)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        for data, code in ((b"bad", "INTERNAL"), (b"full", "RESOURCE_EXHAUSTED")):
            error = await asyncio.to_thread(call.future(data, timeout=60).exception, 60)
            assert error.code().name == code
            assert "secret" not in error.details()
        assert await asyncio.to_thread(call, b"good", timeout=60) == b"good"
    await server.stop(0)


async def test_a_draining_server_turns_calls_away_from_its_fast_paths_too():
    server, channel = await serve(echo)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"x", timeout=60) == b"x"
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0)
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, b"x", timeout=60)
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        await stopping
