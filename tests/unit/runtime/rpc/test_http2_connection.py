"""One connection of the server, whose other end is played here: no sockets. The methods of the server echo."""

import asyncio
import gzip
import struct
import time
from collections import deque

import grpc
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.driver import ON_LOOP
from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.http2_connection import Connection
from services.runtime.rpc.native_server import NativeServer
from services.runtime.rpc.rpc import Answer, Failure
from tests.system.raw_http2 import frame

MAX_FRAME = 16_384
LIMIT = 4 << 20
METHODS = ("Echo", "Late", "Task", "Chat")
FAILED = "x" * 100_000


def head(method, *more):
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", f"/t.T/{method}"), (":authority", "x"),
        ("content-type", "application/grpc"), ("te", "trailers"), *more,
    ]  # fmt: skip
    return hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*field) for field in fields])


def message(data, flag=0):
    return bytes([flag]) + struct.pack(">I", len(data)) + data


def settings_of(*pairs):
    return frame(h2.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def call(stream, method, data=b"", *more):
    return frame(h2.HEADERS, h2.END_HEADERS, stream, head(method, *more)) + frame(
        h2.DATA, h2.END_STREAM, stream, message(data)
    )


async def echo(data, metadata, deadline):
    return Answer(data[:1], (), None, (data[1:],))


async def late(data, metadata, deadline):
    await ON_LOOP
    await asyncio.sleep(0)
    return Answer(data, ())


async def fail(data, metadata, deadline):
    return Failure(grpc.StatusCode.NOT_FOUND, FAILED, ())


async def due(data, metadata, deadline):
    return Answer(repr(deadline).encode(), ())


async def trailing(data, metadata, deadline):
    return Answer(data, [("x-a", FAILED)])


async def stubborn(data, metadata, deadline):
    try:
        await ON_LOOP
    finally:
        await ON_LOOP
    return Answer(data, ())


async def cancelled(data, metadata, deadline):
    raise asyncio.CancelledError


FAST_PATHS = (echo, late, fail, trailing, due, stubborn, cancelled)


async def task(data, context):
    await asyncio.sleep(0)
    return data


async def chat(messages, context):
    async for one in messages:
        yield one


async def never(messages, context):
    await asyncio.Event().wait()
    yield b""


class Transport(asyncio.Transport):
    """Passes on what is written, unless it is held."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection
        self.written = bytearray()
        self.queued = 0
        self.most = 0
        self.is_held = self.is_paused = self.is_over = False

    def set_write_buffer_limits(self, high=None, low=None):
        self.high = high

    def get_write_buffer_size(self):
        return self.queued

    def write(self, data):
        assert not self.is_over
        self.written += data
        if self.is_held:
            self.queued += len(data)
            self.most = max(self.most, self.queued)
            if self.queued > self.high and not self.is_paused:
                self.is_paused = True
                self.connection.pause_writing()

    def hold(self):
        self.is_held = True

    def pause(self):
        """As if what was written last were too much."""
        self.is_held = True
        if not self.is_paused:
            self.is_paused = True
            self.connection.pause_writing()

    def release(self):
        self.is_held, self.queued = False, 0
        if self.is_paused:
            self.is_paused = False
            self.connection.resume_writing()

    def is_closing(self):
        return self.is_over

    def close(self):
        if not self.is_over:
            self.is_over = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    abort = close


class Client:
    """A connection to a server of its own, and what has come from it: by stream, the answer, its status (None: it is
    not there) and the code of a reset. It asserts that the server keeps to its windows and frames."""

    def __init__(self, *pairs):
        self.server = NativeServer({f"/t.T/{f.__name__.title()}": f for f in FAST_PATHS}, LIMIT)
        unary = grpc.unary_unary_rpc_method_handler
        handlers = {f.__name__.title(): unary(task) for f in (*FAST_PATHS, task)}
        handlers["Chat"] = grpc.stream_stream_rpc_method_handler(chat)
        handlers["Never"] = grpc.stream_stream_rpc_method_handler(never)
        self.server.add_registered_method_handlers("t.T", handlers)
        self.connection = Connection(self.server)
        self.transport = Transport(self.connection)
        self.connection.connection_made(self.transport)
        self.windows = {0: 65_535}
        self.new_window = dict(pairs).get(4, 65_535)
        self.largest_frame = dict(pairs).get(5, MAX_FRAME)
        self.answers, self.status, self.details, self.resets, self.granted = {}, {}, {}, {}, {}
        self.goaway = None
        self._decoder = hpack.Decoder(1 << 20)
        self._decoder.max_header_list_size = 1 << 20
        self._read = 0
        self._block = None
        self.opening = h2.PREFACE + settings_of(*pairs)

    def send(self, data):
        if not self.transport.is_over:
            self.connection.data_received(data)

    def read(self):
        written = self.transport.written
        while len(written) - self._read >= 9:
            size = int.from_bytes(written[self._read : self._read + 3], "big")
            at = self._read + 9
            if len(written) < at + size:
                return
            assert size <= self.largest_frame
            kind, flags = written[self._read + 3], written[self._read + 4]
            number = int.from_bytes(written[self._read + 5 : at], "big")
            self._read = at + size
            self._take(kind, flags, number, bytes(written[at : at + size]))

    def _take(self, kind, flags, number, payload):
        assert self._block is None or kind == h2.CONTINUATION
        if kind == h2.DATA:
            self._window(number)
            self.windows[0] -= len(payload)
            self.windows[number] -= len(payload)
            assert self.windows[0] >= 0
            assert self.windows[number] >= 0 or not payload
            assert number not in self.status
            self.answers[number] = self.answers.get(number, b"") + payload
        elif kind in (h2.HEADERS, h2.CONTINUATION):
            self._block = (self._block or b"") + payload
            if kind == h2.HEADERS:
                self._flags = flags
            if flags & h2.END_HEADERS:
                fields = {bytes(name): bytes(value) for name, value in self._decoder.decode(self._block, raw=True)}
                self._block = None
                if self._flags & h2.END_STREAM:
                    assert number not in self.status
                    self.status[number] = int(fields.get(b"grpc-status", -1))
                    self.details[number] = fields.get(b"grpc-message", b"").decode()
        elif kind == h2.RST_STREAM:
            self.resets[number] = int.from_bytes(payload, "big")
        elif kind == h2.GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == h2.WINDOW_UPDATE:
            self.granted[number] = self.granted.get(number, 0) + int.from_bytes(payload, "big")

    def _window(self, number):
        return self.windows.setdefault(number, self.new_window)

    def grant(self, number, size):
        self._window(number)
        self.windows[number] += size
        self.send(h2.window_update(number, size))

    def resize(self, size):
        """A new size of the windows of streams."""
        for number in self.windows:
            self.windows[number] += (size - self.new_window) if number else 0
        self.new_window = size
        self.send(settings_of((4, size)))

    async def turns(self, count=10):
        for _ in range(count):
            await asyncio.sleep(0)
        self.read()

    def assert_nothing_is_held(self):
        connection, server = self.connection, self.server
        assert (connection._streams, connection._blocked, connection._out) == ({}, {}, [])
        assert (connection._unsent, connection._block) == (0, [])
        assert (server._under_way, server._suspended, server.request_bytes) == (set(), [], 0)

    async def leave(self):
        self.transport.close()
        await self.turns()
        self.assert_nothing_is_held()
        assert self.server._connections == {}


async def connected(*pairs):
    client = Client(*pairs)
    client.send(client.opening)
    return client


@st.composite
def calls(draw):
    """The method of a call, its messages, the frames of its body as (data, padding), and whether it is reset."""
    method = draw(st.sampled_from(METHODS))
    sizes = st.sampled_from([0, 1, 5, 100, 16_384, 20_000, 70_000])
    sent = [bytes([65 + n % 26]) * draw(sizes) for n in range(draw(st.integers(0, 3)) if method == "Chat" else 1)]
    body = b"".join(message(one) for one in sent)
    frames = []
    while body:
        size = draw(st.sampled_from([1, 3, 5, 1000, 65_000]))
        frames.append((body[:size], draw(st.none() | st.integers(0, 255))))
        body = body[size:]
        if len(frames) > 8:
            frames += [(body[at : at + 60_000], None) for at in range(0, len(body), 60_000)]
            break
    return method, sent, frames, draw(st.none() | st.integers(0, 6)) if draw(st.integers(0, 4)) == 0 else None


def frames_of(number, one, ends_apart):
    method, _, parts, reset_after = one
    block = head(method)
    out = [frame(h2.HEADERS, 0, number, block[:7]) + frame(h2.CONTINUATION, h2.END_HEADERS, number, block[7:])]
    for place, (data, padding) in enumerate(parts):
        last = h2.END_STREAM if place == len(parts) - 1 and not ends_apart else 0
        payload = data if padding is None else bytes([padding]) + data + bytes(padding)
        out.append(frame(h2.DATA, last | (0 if padding is None else h2.PADDED), number, payload))
    if ends_apart or not parts:
        out.append(frame(h2.DATA, h2.END_STREAM, number))
    if reset_after is not None:
        out = [*out[: 1 + reset_after], h2.reset(number, h2.CANCEL)]
    return out


STEPS = st.lists(st.sampled_from(["turn", "pause", "release", "stream", "connection", "resize"]), max_size=12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(calls(), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([0, 1, 1000, 65_535, 1 << 20]),
    st.sampled_from([16_384, 100_000]),
    st.lists(st.sampled_from([1, 8, 9, 50, 3000, 100_000]), min_size=1, max_size=5),
    STEPS,
    st.randoms(use_true_random=False),
)
def test_however_bytes_are_split_and_windows_open_each_call_is_answered(plan, first, frame_size, sizes, steps, chance):
    asyncio.run(_conversation(plan, first, frame_size, sizes, steps, chance))


async def _conversation(plan, first, frame_size, sizes, steps, chance):
    client = Client((4, first), (5, frame_size))
    queues = [deque(frames_of(2 * place + 1, one, apart)) for place, (one, apart) in enumerate(plan)]
    # Streams open in the order of their numbers; after that their frames come in any order.
    data = client.opening + b"".join(queue.popleft() for queue in queues)
    while any(queues):
        data += chance.choice([queue for queue in queues if queue]).popleft()
    chunks, at, place = [], 0, 0
    while at < len(data):
        size = sizes[place % len(sizes)] if place < 300 else 100_000
        chunks.append(data[at : at + size])
        at, place = at + size, place + 1
    due = sorted(chance.randrange(len(chunks)) for _ in steps)
    for place, chunk in enumerate(chunks):
        client.send(chunk)
        while due and due[0] == place:
            due.pop(0)
            await _step(client, steps[len(due)], chance, len(plan))
    for step in steps:
        await _step(client, step, chance, len(plan))
    client.transport.release()
    await client.turns()
    client.grant(0, 1 << 24)
    for number in range(1, 2 * len(plan), 2):
        client.grant(number, 1 << 22)
    await client.turns(60)
    assert client.goaway is None
    for place, ((_, sent, _, reset_after), _) in enumerate(plan):
        number = 2 * place + 1
        if reset_after is None:
            assert client.answers.get(number, b"") == b"".join(message(one) for one in sent)
            assert client.status[number] == 0
            assert number not in client.resets
    client.assert_nothing_is_held()
    await client.leave()


async def _step(client, step, chance, count):
    client.read()
    connection, number = client.connection, 2 * chance.randrange(count) + 1
    is_between_frames = (
        connection._has_begun and not connection._rest and not connection._part_left and not connection._block_number
    )
    if step == "pause":
        client.transport.pause()
    elif step == "release":
        client.transport.release()
    elif not is_between_frames:
        pass
    elif step == "stream" and number <= connection._last_number:
        client.grant(number, chance.choice([1, 70_000]))
    elif step == "connection":
        client.grant(0, chance.choice([1, 70_000]))
    elif step == "resize":
        client.resize(chance.choice([0, 100, 70_000]))
    await client.turns(chance.choice([0, 1, 5]))


FRAMES = st.lists(
    st.tuples(
        st.integers(0, 10),
        st.sampled_from([0, 1, 4, 5, 8, 9, 12, 13, 32, 37]),
        st.sampled_from([0, 1, 1, 1, 2, 3, 5, 2**31 - 1]),
        st.binary(max_size=30)
        | st.sampled_from([head("Echo"), head("Chat"), head("None"), message(b"abc"), message(b"abc", 1), b"\0\0\0\1"])
        | st.sampled_from([struct.pack(">I", 8), struct.pack(">HI", 4, 0), struct.pack(">HI", 5, 16_384), bytes(8)]),
    ),
    max_size=20,
)


@settings(max_examples=150)
@given(FRAMES, st.sampled_from([1, 7, 100_000]))
def test_no_frames_raise_and_nothing_is_held_after_them(frames, size):
    async def fed():
        client = await connected()
        data = b"".join(frame(*one) for one in frames)
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
        await client.turns()
        await client.leave()

    asyncio.run(fed())


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_no_bytes_raise(data):
    async def fed():
        for opening in (b"", h2.PREFACE):
            client = Client()
            client.send(opening + data)
            await client.leave()

    asyncio.run(fed())


async def test_a_second_message_is_refused_where_the_method_takes_one():
    client = await connected()
    client.send(
        frame(h2.HEADERS, h2.END_HEADERS, 1, head("Echo")) + frame(h2.DATA, 0, 1, message(b"a") + message(b"b"))
    )
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 3, head("Echo")) + frame(h2.DATA, 0, 3, message(b"a")))
    client.send(frame(h2.DATA, h2.END_STREAM, 3, b"\0"))
    client.read()
    assert client.status == {1: 13, 3: 13}
    assert "second message" in client.details[1]
    await client.leave()


@pytest.mark.parametrize("closing", ["end", "refuse"])
async def test_an_answer_that_ends_while_the_socket_is_full_ends_when_it_is_not(closing):
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Chat")) + frame(h2.DATA, 0, 1, message(b"a")))
    await client.turns()
    client.transport.pause()
    last = frame(h2.DATA, h2.END_STREAM, 1) if closing == "end" else frame(h2.DATA, 0, 1, message(b"b", 1))
    client.send(last)
    await client.turns()
    client.transport.release()
    await client.turns()
    assert client.status == ({1: 0} if closing == "end" else {1: 13})
    client.assert_nothing_is_held()


async def test_the_end_of_an_answer_needs_no_window():
    client = await connected((4, 1 << 20))
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Chat")) + frame(h2.DATA, 0, 1, message(b"a")))
    await client.turns()
    client.send(call(3, "Task", bytes(40_000)) + call(5, "Task", bytes(40_000)))
    await client.turns()
    assert client.windows[0] == 0
    client.transport.pause()
    client.send(frame(h2.DATA, h2.END_STREAM, 1))
    await client.turns()
    client.transport.release()
    await client.turns()
    assert client.status == {1: 0, 3: 0}


@pytest.mark.parametrize("opened", ["connection", "stream", "settings"])
async def test_an_answer_goes_on_when_what_held_it_up_is_gone(opened):
    client = await connected((4, 10 if opened != "connection" else 1 << 20))
    if opened != "connection":
        client.grant(0, 1 << 20)
    client.send(call(1, "Task", bytes(60_000)) + call(3, "Task", bytes(60_000)))
    await client.turns()
    assert len(client.status) < 2
    if opened == "connection":
        client.grant(0, 60_000)
    elif opened == "stream":
        client.grant(1, 60_000)
        client.grant(3, 60_000)
    else:
        client.resize(1 << 20)
    await client.turns()
    assert client.status == {1: 0, 3: 0}


async def test_a_long_answer_goes_on_by_itself():
    client = await connected((4, 1 << 24))
    client.grant(0, 1 << 24)
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Task")))
    body = message(bytes(1_000_000))
    for at in range(0, len(body), 50_000):
        client.send(frame(h2.DATA, 0, 1, body[at : at + 50_000]))
    client.send(frame(h2.DATA, h2.END_STREAM, 1))
    await client.turns(20)
    assert client.answers[1] == body
    assert client.status == {1: 0}


@pytest.mark.parametrize("padding", [0, 255])
@pytest.mark.parametrize(("method", "size"), [("Task", 3_000_000), ("Chat", 3_000_000), ("Chat", 100_000)])
async def test_a_client_that_keeps_to_its_windows_can_send_all(method, size, padding):
    client = await connected((4, 1 << 30))
    client.grant(0, 1 << 30)
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head(method)))
    body = message(bytes(size)) * (3_000_000 // size)
    room, at = 1 << 20, 0
    while at < len(body):
        part = body[at : at + min(30_000, room - padding - 1)]
        assert part, "no room"
        room -= len(part) + padding + 1
        client.send(frame(h2.DATA, h2.PADDED, 1, bytes([padding]) + part + bytes(padding)))
        at += len(part)
        await client.turns(3)
        room += client.granted.pop(1, 0)
    client.send(frame(h2.DATA, h2.END_STREAM, 1))
    async with asyncio.timeout(60):
        while client.connection._streams:
            await asyncio.sleep(0.001)
    await client.turns()
    assert client.answers[1] == body
    client.assert_nothing_is_held()


async def test_a_client_has_room_again_when_its_messages_are_read():
    """The method waits for its first answer to be taken, and reads no more meanwhile."""
    client = await connected((4, 10))
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Chat")))
    part = frame(h2.DATA, 0, 1, message(bytes(60_000)))
    for _ in range(17):
        client.send(part)
    await client.turns()
    assert client.granted.get(1, 0) < 300_000
    client.grant(0, 1 << 24)
    client.grant(1, 1 << 24)
    await client.turns(40)
    assert client.granted[1] > 500_000
    client.send(frame(h2.DATA, h2.END_STREAM, 1))
    await client.turns()
    assert client.status == {1: 0}


async def test_a_client_that_reads_no_refusals_is_cut():
    """One chunk after the other, and all in one."""
    for size in (1, 1000):
        client = await connected()
        client.transport.hold()
        calls = [call(number, "Fail", b"a") for number in range(1, 801, 2)]
        while calls and client.goaway is None:
            client.send(b"".join(calls[:size]))
            del calls[:size]
            client.read()
        assert client.goaway == 11
        assert client.transport.most < 20 << 20


@pytest.mark.parametrize("method", ["Echo", "Late"])
async def test_what_one_chunk_asks_for_is_not_all_made_at_once(method):
    """Hundreds of answers to one chunk, each as large as the client's windows let it be."""
    client = await connected((4, 2**31 - 1), (5, 2**24 - 1))
    client.grant(0, 2**31 - 1 - 65_535)
    client.transport.hold()
    body = bytes(60_000)
    client.send(b"".join(call(number, method, body) for number in range(1, 401, 2)))
    await client.turns()
    assert client.transport.most < 4 << 20
    for _ in range(30):
        client.transport.release()
        client.transport.hold()
        await client.turns()
    client.read()
    assert client.status == dict.fromkeys(range(1, 401, 2), 0)
    client.assert_nothing_is_held()


@pytest.mark.parametrize("method", ["Fail", "Trailing"])
async def test_long_trailers_come_in_frames_that_the_client_takes(method):
    client = await connected()
    client.send(call(1, method, b"abc"))
    await client.turns()
    client.send(call(3, "Echo", b"abc"))
    client.read()
    assert client.status == {1: 5 if method == "Fail" else 0, 3: 0}
    assert client.answers.get(1, b"") == (b"" if method == "Fail" else message(b"abc"))


async def test_empty_parts_of_an_answer_change_no_window():
    client = await connected((4, 5))
    client.send(call(1, "Echo", b""))
    client.send(call(3, "Echo", b"a"))
    client.resize(0)
    client.resize(4)
    client.resize(6)
    await client.turns()
    assert client.status == {1: 0, 3: 0}


async def test_late_trailers_of_a_call_that_has_ended_are_ignored():
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Nothing")))
    client.read()
    assert client.status == {1: 12}
    client.send(frame(h2.DATA, 0, 1, message(b"")))
    client.send(frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, hpack.Encoder().encode([("x-a", "1")])))
    client.send(call(3, "Echo", b"a"))
    client.read()
    assert (client.goaway, client.status[3]) == (None, 0)
    client.send(call(1, "Echo", b"a"))  # a number that is no longer free
    client.read()
    assert client.goaway == 1


async def test_what_follows_a_message_that_is_refused_is_not_kept():
    """The answer had begun, so that its status waits for the event loop."""
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Never")))
    await client.turns()
    client.connection.open(client.connection._streams[1], b"")
    client.transport.pause()
    client.send(frame(h2.DATA, 0, 1, message(b"")[:1] + struct.pack(">I", LIMIT + 1)))
    stream = client.connection._streams.get(1)
    for _ in range(10):
        client.send(frame(h2.DATA, 0, 1, bytes(60_000)))
    assert stream is None or stream.size <= 5
    client.read()
    assert 1 not in client.granted
    await client.leave()


async def test_many_settings_in_one_frame_are_refused():
    client = await connected()
    client.send(settings_of(*[(4, n) for n in range(1000)]))
    client.read()
    assert client.goaway == 11


async def test_small_parts_of_a_message_are_kept_together():
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Echo")))
    body = message(bytes(range(256)) * 100)
    for at in range(0, len(body), 2):
        client.send(frame(h2.DATA, 0, 1, body[at : at + 2]))
    assert len(client.connection._streams[1].parts) < 100
    client.send(h2.window_update(1, 100_000) + frame(h2.DATA, h2.END_STREAM, 1))
    await client.turns()
    assert client.answers[1] == body


async def test_long_blocks_of_headers_are_not_remembered():
    client = await connected()
    for number in range(1, 101, 2):
        client.send(call(number, "Echo", b"", ("x-a", f"{number}" * 5000)))
    assert sum(len(block) for block in client.connection._heads) < 500_000


async def compressed(client, *bodies):
    parts = b"".join(message(gzip.compress(body), 1) for body in bodies)
    method = "Chat" if len(bodies) > 1 else "Task"
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head(method, ("grpc-encoding", "gzip"))))
    client.send(frame(h2.DATA, h2.END_STREAM, 1, parts))
    async with asyncio.timeout(60):
        while client.connection._streams:
            await asyncio.sleep(0.001)
    await client.turns()


async def test_compressed_messages_are_read():
    for bodies in ([b"abc"], [b"abc", b"", b"d" * 1000]):
        client = await connected()
        await compressed(client, *bodies)
        assert client.answers == {1: b"".join(message(one) for one in bodies)}
        assert client.status == {1: 0}
        await client.leave()


async def test_a_compressed_message_over_the_limit_is_refused():
    for bodies in ([bytes(LIMIT + 1)], [b"abc", bytes(LIMIT + 1)]):
        client = await connected()
        await compressed(client, *bodies)
        assert client.status == {1: 8}
        await client.leave()


async def test_compressed_messages_of_a_stream_are_expanded_when_they_are_read():
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Never", ("grpc-encoding", "gzip"))))
    packed = message(gzip.compress(bytes(LIMIT)), 1)
    for _ in range(10):
        client.send(frame(h2.DATA, 0, 1, packed))
    assert client.connection._streams[1].messages.bytes < 100_000
    await client.leave()


async def test_a_deadline_counts_from_the_headers():
    client = await connected()
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Due", ("grpc-timeout", "1000S"))))
    latest = time.monotonic() + 1000
    client.send(frame(h2.DATA, h2.END_STREAM, 1, message(b"")))
    client.read()
    assert float(client.answers[1][5:]) <= latest


async def test_a_call_that_does_not_let_itself_be_closed_holds_up_no_other():
    client = await connected()
    left = call(1, "Stubborn") + h2.reset(1, h2.CANCEL)
    client.send(left + call(3, "Late", b"a"))
    await client.turns()
    assert client.status == {3: 0}
    client.assert_nothing_is_held()


async def test_a_call_that_is_cancelled_as_it_begins_ends_alone():
    client = await connected()
    client.send(call(1, "Cancelled") + call(3, "Echo", b"a"))
    client.read()
    assert client.status == {1: 13, 3: 0}
    client.assert_nothing_is_held()


async def test_a_connection_that_is_lost_holds_no_part_of_a_request():
    client = await connected()
    client.send(call(1, "Echo", b"a") + frame(h2.HEADERS, 0, 3, head("Echo")) + frame(h2.CONTINUATION, 0, 3, b"x")[:-1])
    await client.leave()
    connection = client.connection
    assert (connection._rest, connection._block, connection._heads) == (b"", [], {})


@pytest.mark.parametrize("first", [frame(h2.PING, 0, 0, bytes(8)), frame(h2.SETTINGS, h2.ACK, 0), call(1, "Echo")])
async def test_a_client_says_its_settings_first(first):
    client = Client()
    client.send(h2.PREFACE + first)
    client.read()
    assert (client.goaway, client.status) == (1, {})
    await client.leave()


@pytest.mark.parametrize("method", ["Echo", "Never"])
async def test_a_request_is_refused_while_those_under_way_are_too_large_together(method):
    client = await connected()
    client.server.max_request_bytes = 50_000
    part = message(bytes(40_000))[:30_000]
    for number in (1, 3):
        client.send(frame(h2.HEADERS, h2.END_HEADERS, number, head(method)) + frame(h2.DATA, 0, number, part))
    await client.turns()
    assert client.status == {3: 8}
    client.send(frame(h2.RST_STREAM, 0, 1, struct.pack(">I", 8)))
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 5, head("Echo")) + frame(h2.DATA, 0, 5, part))
    client.send(frame(h2.DATA, h2.END_STREAM, 5, message(bytes(40_000))[30_000:]))
    await client.turns()
    assert client.status == {3: 8, 5: 0}
    await client.leave()


async def test_messages_that_were_read_make_room_for_others():
    client = await connected()
    client.server.max_request_bytes = 100_000
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Chat")))
    for _ in range(4):
        client.send(frame(h2.DATA, 0, 1, message(bytes(60_000))))
        await client.turns()
    client.send(frame(h2.DATA, h2.END_STREAM, 1))
    await client.turns()
    assert client.status == {}
    client.grant(0, 1 << 20)
    client.grant(1, 1 << 20)
    await client.turns()
    assert client.status == {1: 0}
    await client.leave()


async def test_what_a_message_expands_to_counts():
    client = await connected()
    client.server.max_request_bytes = 100_000
    body = message(gzip.compress(bytes(200_000)), flag=1)
    client.send(frame(h2.HEADERS, h2.END_HEADERS, 1, head("Echo", ("grpc-encoding", "gzip"))))
    client.send(frame(h2.DATA, h2.END_STREAM, 1, body))
    async with asyncio.timeout(60):
        while not client.status:
            await asyncio.sleep(0.001)
            client.read()
    assert client.status == {1: 8}
    await client.leave()
