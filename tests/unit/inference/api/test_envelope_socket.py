"""Envelopes over a Unix socket: for its user alone, lossless while either side leaves, and gone when nobody listens."""

import asyncio
import collections
import random
import socket
import time
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.transport.grpc_channel import CallError
from router.transport.local_channel import LocalConnection
from services.inference.api.envelope_socket import EnvelopeSocket
from services.runtime import frames
from services.runtime.driver import ON_LOOP
from services.runtime.rpc.rpc import Answer, Failure
from tests.conftest import sources_only

LARGEST = 1 << 20


class Echo:
    """Answers with what came: b"now..." at once, others when the gate is open; b"refuse" and b"break" as they say."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.begun = self.cancelled = 0
        self.codes = collections.Counter()

    def count(self, code):
        self.codes[code] += 1

    async def execute(self, data, metadata, deadline):
        if data == b"refuse":
            return Failure(grpc.StatusCode.UNAVAILABLE, "zu viel: über dem Rand", ())
        if data == b"break":
            raise ZeroDivisionError
        if not data.startswith(b"now"):
            self.begun += 1
            await ON_LOOP
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if data == b"break later":
            raise ZeroDivisionError
        return Answer(data, ())

    async def has_begun(self, calls):
        async with asyncio.timeout(60):
            while self.begun < calls:
                await asyncio.sleep(0)


@pytest.fixture
async def echo(tmp_path):
    made = Echo()
    made.server = EnvelopeSocket(str(tmp_path), made.execute, LARGEST, made.count)
    made.path = await made.server.start()
    made.connection = await connect(made.path)
    yield made
    made.gate.set()
    made.connection.close()
    await made.server.stop(1)


async def connect(path):
    _, made = await asyncio.get_running_loop().create_unix_connection(LocalConnection, path)
    return made


def begun(connection, data):
    """The future answer, with what cancels it."""
    answered = asyncio.get_running_loop().create_future()
    return answered, connection.begin([data], answered.set_result)


async def call(connection, data):
    return await asyncio.wait_for(begun(connection, data)[0], 20)


async def over(connection):
    async with asyncio.timeout(60):
        while connection.transport is not None:
            await asyncio.sleep(0)


async def test_an_envelope_of_any_size_comes_back_as_it_was(echo):
    for size in (0, 1, 65_536, 300_000, LARGEST - 3):
        body = b"now" + random.Random(size).randbytes(size)
        assert await call(echo.connection, body) == body, size


async def test_many_at_once_each_get_their_own_answer_at_once_or_later(echo):
    bodies = [random.Random(index).choice([b"now", b"later"]) + bytes([index]) * index * 70 for index in range(200)]
    waiting = [begun(echo.connection, body)[0] for body in bodies]
    echo.gate.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == bodies


async def test_each_counts_by_the_code_it_ended_with(echo):
    for body in (b"now", b"refuse", b"break", bytes(LARGEST + 1)):
        await call(echo.connection, body)
    _, cancel = begun(echo.connection, b"cancelled")
    await echo.has_begun(1)
    cancel()
    await call(echo.connection, b"now")
    assert echo.codes == {"OK": 2, "UNAVAILABLE": 1, "INTERNAL": 1, "RESOURCE_EXHAUSTED": 1, "CANCELLED": 1}


async def test_a_failure_comes_with_its_words_and_a_fault_with_where_to_look(echo):
    echo.gate.set()
    refused, broken, broken_later = [
        await call(echo.connection, what) for what in (b"refuse", b"break", b"break later")
    ]
    assert (refused.code, refused.details) == (grpc.StatusCode.UNAVAILABLE, "zu viel: über dem Rand")
    for fault in (broken, broken_later):
        assert fault.code is grpc.StatusCode.INTERNAL
        assert "log has the cause" in fault.details


async def test_one_that_is_too_large_is_refused_and_the_next_is_not(echo):
    answers = [begun(echo.connection, body)[0] for body in (bytes(LARGEST + 1), b"now", bytes(3 * LARGEST), b"now too")]
    first, second, third, fourth = await asyncio.wait_for(asyncio.gather(*answers), 20)
    assert (second, fourth) == (b"now", b"now too")
    assert first.code is third.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"takes {LARGEST} at most" in first.details


async def test_one_that_nobody_waits_for_is_cancelled_and_others_go_on(echo):
    gone, cancel = begun(echo.connection, b"gone")
    stays, _ = begun(echo.connection, b"stays")
    await echo.has_begun(2)
    cancel()
    assert await call(echo.connection, b"now") == b"now"
    echo.gate.set()
    assert await stays == b"stays"
    assert echo.cancelled == 1
    assert not gone.done()


async def test_a_router_that_is_gone_has_its_envelopes_cancelled(echo):
    answered, _ = begun(echo.connection, b"under way")
    await echo.has_begun(1)
    echo.connection.close()
    assert (await answered).lost
    async with asyncio.timeout(60):
        while not echo.cancelled:
            await asyncio.sleep(0)


async def test_a_worker_that_leaves_finishes_what_it_has_and_is_sent_nothing_more(echo):
    under_way, _ = begun(echo.connection, b"under way")
    idle = await connect(echo.path)
    await echo.has_begun(1)
    stopping = asyncio.create_task(echo.server.stop(20))
    await over(idle)
    assert not echo.connection.is_open
    assert not stopping.done()
    echo.gate.set()
    assert await under_way == b"under way"
    await stopping
    assert not await asyncio.to_thread(Path(echo.path).exists)


async def test_a_router_that_does_not_hear_does_not_hold_up_a_worker_that_has_nothing_to_do(echo, monkeypatch):
    monkeypatch.setattr("services.inference.api.envelope_socket._LEAVE_SECONDS", 0.05)
    deaf = await asyncio.open_unix_connection(echo.path)
    async with asyncio.timeout(60):
        await echo.server.stop(300)
    deaf[1].close()


async def test_what_is_not_finished_in_time_fails_as_a_server_that_stops(echo):
    under_way, _ = begun(echo.connection, b"under way")
    await echo.has_begun(1)
    await echo.server.stop(0.01)
    failed = await under_way
    assert (failed.code, failed.lost) == (grpc.StatusCode.UNAVAILABLE, False)
    assert echo.cancelled == 1


@pytest.mark.parametrize(
    "said", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\0\x03\0\0\0\1", b"\0\0\0\0\x09\0\0\0\1"]
)
async def test_who_says_something_else_is_hung_up_on(echo, said):
    reader, writer = await asyncio.open_unix_connection(echo.path)
    writer.write(said)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    assert await call(echo.connection, b"now") == b"now"


@pytest.mark.parametrize(
    "said",
    [b"", b"\0\0\0\0\0\0\0\0\1", b"\0\0\0\0\x03\0\0\0\0", b"\0\0\0\0\x05\0\0\0\1", b"HTTP/1.1 400 Bad Request\r\n\r\n"],
)
async def test_a_worker_that_says_something_else_is_lost(tmp_path, said):
    async def misbehave(reader, writer):
        await reader.readexactly(9)
        writer.write(said)
        writer.close()

    async with await asyncio.start_unix_server(misbehave, tmp_path / "s"):
        failed = await call(await connect(str(tmp_path / "s")), b"")
    assert isinstance(failed, CallError)
    assert (failed.code, failed.lost) == (grpc.StatusCode.UNAVAILABLE, True)


def frame(kind, number, payload=b""):
    return len(payload).to_bytes(4, "big") + bytes((kind,)) + number.to_bytes(4, "big") + payload


@sources_only("the test's class inherits from a compiled one; Connection and LocalConnection are tested compiled")
@given(st.lists(st.integers(1, 40)), st.lists(st.binary(max_size=60), max_size=8))
async def test_frames_may_come_in_any_pieces_and_those_too_large_are_passed_by(sizes, payloads):
    class Kept(frames.FrameConnection):
        def __init__(self):
            super().__init__(50)
            self.heard = []

        def take(self, kind, number, payload):
            self.heard.append((kind, number, payload))

        def too_large(self, kind, number, size):
            self.heard.append((kind, number, size))

    kept = Kept()
    stream = b"".join(frame(index % 5, index, payload) for index, payload in enumerate(payloads))
    position = 0
    for size in [*sizes, len(stream)]:
        kept.data_received(stream[position : position + size])
        position += size
    assert kept.heard == [
        (index % 5, index, payload if len(payload) <= 50 else len(payload)) for index, payload in enumerate(payloads)
    ]


async def test_only_the_owner_may_enter_and_it_is_removed_at_the_end(tmp_path):
    server = EnvelopeSocket(str(tmp_path), Echo().execute, LARGEST, print)
    path = Path(await server.start())
    assert [place.stat().st_mode & 0o777 for place in (path, path.parent)] == [0o600, 0o700]
    await server.stop(0)
    assert list(tmp_path.iterdir()) == []


async def test_one_that_stopped_keeps_no_core_busy(tmp_path):
    server = EnvelopeSocket(str(tmp_path), Echo().execute, LARGEST, print)
    await server.start()
    await server.stop(0)
    before = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - before < 0.2


async def test_what_killed_processes_left_is_removed_and_what_is_listened_on_stays(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / f"ringmesh-{name}").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "ringmesh-dead/grpc.sock"))
    checkout = tmp_path / "ringmesh-checkout"
    checkout.mkdir()
    for name in ("envelopes.sock", "redis.sock"):
        (checkout / name).write_text("not a socket of ours")
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(tmp_path / "ringmesh-alive/envelopes.sock"))
        alive.listen()
        server = EnvelopeSocket(str(tmp_path), Echo().execute, LARGEST, print)
        path = Path(await server.start())
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "ringmesh-alive", checkout, path.parent])
        assert len([*checkout.iterdir()]) == 2
        await server.stop(0)


@pytest.mark.parametrize("folder", ["", "missing", "x" * 100])
async def test_where_there_can_be_no_socket_there_is_none(tmp_path, folder):
    if len(folder) == 100:  # too long for the path of a socket
        (tmp_path / folder).mkdir()
    server = EnvelopeSocket(folder and str(tmp_path / folder), Echo().execute, LARGEST, print)
    assert await server.start() == ""
    await server.stop(0)
    assert [*tmp_path.rglob("ringmesh-*")] == []


async def test_a_connection_ends_before_its_numbers_do(echo):
    echo.connection._next = 2**32 - 2
    assert await call(echo.connection, b"now") == b"now"
    await over(echo.connection)
    assert isinstance(echo.connection, LocalConnection)
    assert not echo.connection.is_open
