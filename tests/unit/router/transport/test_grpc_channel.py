"""Our own gRPC client against real servers on both engines, and against a server that misbehaves."""

import asyncio
import random
import ssl
import struct
from types import SimpleNamespace

import grpc
import hpack
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.transport.grpc_channel import CallError, GrpcChannel
from router.transport.http2 import Connection, ConnectionLostError
from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.rpc import Service
from services.runtime.rpc.server import Engine, Server
from tests.system.processes import free_address
from tests.system.raw_http2 import frame

SERVICE = v2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
METHOD = "/inference.GRPCInferenceService/ModelInfer"


async def failure(serve):
    """How a call fails on a server that does `serve` with each connection."""
    address = free_address()
    host, _, port = address.partition(":")
    async with await asyncio.start_server(serve, host, int(port)):
        with pytest.raises(CallError) as caught:
            await asyncio.wait_for(GrpcChannel(address).call(METHOD, b"x"), 60)
    return caught.value


class Echo:
    """Answers with what came, when the gate is open; `refuse` ends calls with a status."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse = None
        self.cancelled = 0
        self.calls = 0

    async def infer(self, request, context):
        self.calls += 1
        if self.refuse is not None:
            await context.abort(*self.refuse)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        context.set_trailing_metadata((("answered", str(random.random())), ("bytes-bin", b"\0\xff")))
        return request


@pytest.fixture(params=[Engine.NATIVE, Engine.GRPCIO])
async def echo(request):
    made = Echo()
    address = free_address()
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(made.infer)}
    server = Server(
        request.param, address, [Service(SERVICE, handlers)], max_message_bytes=64 << 20, max_connection_age=300
    )
    await server.start()
    made.address = address
    made.channel = GrpcChannel(address)
    made.server = server
    yield made
    made.gate.set()
    made.channel.drop()
    await server.stop(1)


async def call(echo, body):
    return await asyncio.wait_for(echo.channel.call(METHOD, body), 20)


async def test_a_message_of_any_size_comes_back_as_it_was(echo):
    for size in (0, 1, 16_378, 16_379, 16_380, 65_530, 65_536, 1 << 20, 20 << 20):
        body = random.Random(size).randbytes(size)
        assert await call(echo, body) == body, size


async def test_many_calls_at_once_each_get_their_own_answer(echo):
    bodies = [random.Random(index).randbytes(index * 97 % 40_000) for index in range(300)]
    assert await asyncio.gather(*(call(echo, body) for body in bodies)) == bodies


async def test_a_status_comes_with_its_words(echo):
    echo.refuse = (grpc.StatusCode.RESOURCE_EXHAUSTED, "zu viel: 100 % \u00fcber dem Rand")
    with pytest.raises(CallError) as caught:
        await call(echo, b"x")
    assert (caught.value.code, caught.value.details) == echo.refuse


async def test_a_method_that_is_not_there_is_unimplemented(echo):
    with pytest.raises(CallError) as caught:
        await echo.channel.call("/inference.GRPCInferenceService/Nothing", b"")
    assert caught.value.code == grpc.StatusCode.UNIMPLEMENTED


async def test_a_cancelled_call_is_cancelled_at_the_server_and_others_go_on(echo):
    echo.gate.clear()
    gone, stays = (asyncio.create_task(call(echo, body)) for body in (b"gone", b"stays"))
    while echo.calls < 2:
        await asyncio.sleep(0.01)
    gone.cancel()
    while not echo.cancelled:
        await asyncio.sleep(0.01)
    echo.gate.set()
    assert await stays == b"stays"
    assert await call(echo, b"next") == b"next"


async def test_a_draining_server_finishes_what_it_has(echo):
    echo.gate.clear()
    under_way = asyncio.create_task(call(echo, b"under way"))
    while not echo.calls:
        await asyncio.sleep(0.01)
    stopping = asyncio.create_task(echo.server.stop(5))
    await asyncio.sleep(0.05)
    echo.gate.set()
    assert await under_way == b"under way"
    await stopping
    with pytest.raises(CallError) as caught:
        await call(echo, b"too late")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


async def test_a_server_is_known_to_be_on_this_host_unless_something_stands_between(echo):
    port = int(echo.address.rpartition(":")[2])
    assert not echo.channel.is_local(port)
    await call(echo, b"x")
    assert echo.channel.is_local(port)
    assert not echo.channel.is_local(port + 1)


async def test_an_engine_answers_a_ping_while_no_handler_answers(echo):
    echo.gate.clear()
    waiting = asyncio.create_task(call(echo, b"x"))
    while not echo.calls:
        await asyncio.sleep(0.01)
    assert await asyncio.gather(*(echo.channel.ping(20) for _ in range(3))) == [True] * 3
    echo.gate.set()
    assert await waiting == b"x"


async def test_a_server_that_reads_nothing_does_not_answer_a_ping():
    async def stopped(reader, writer):
        await asyncio.Event().wait()

    address = free_address()
    host, _, port = address.partition(":")
    server = await asyncio.start_server(stopped, host, int(port))
    channel = GrpcChannel(address)
    waiting = asyncio.create_task(channel.call(METHOD, b"x"))
    while channel._connection is None:
        await asyncio.sleep(0.01)
    assert not await channel.ping(0.01)
    assert channel._connection._pings == {}
    channel.drop()
    with pytest.raises(CallError):
        await waiting
    server.close()


async def test_a_server_that_is_not_there_is_unavailable():
    with pytest.raises(CallError) as caught:
        await GrpcChannel(free_address()).call(METHOD, b"")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


async def test_a_call_whose_connection_fails_in_an_unexpected_way_is_answered():
    with pytest.raises(CallError, match="could not begin") as caught:
        await asyncio.wait_for(GrpcChannel("127.0.0.1:70000").call(METHOD, b""), 20)
    assert caught.value.code == grpc.StatusCode.INTERNAL


async def test_a_server_that_comes_back_is_found_again():
    address = free_address()
    channel = GrpcChannel(address)
    made = Echo()
    for _ in range(2):
        with pytest.raises(CallError):
            await channel.call(METHOD, b"x")
        handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(made.infer)}
        server = Server(
            Engine.NATIVE, address, [Service(SERVICE, handlers)], max_message_bytes=1 << 20, max_connection_age=300
        )
        await server.start()
        assert await channel.call(METHOD, b"x") == b"x"
        await server.stop(0)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 64,
        frame(h2.HEADERS, 0x4, 1, b"\xff\xff\xff\xff\xff"),
        frame(h2.WINDOW_UPDATE, 0, 0, b"\0\0"),
        frame(h2.HEADERS, 0, 1) + frame(h2.DATA, 0, 1),
        b"",
    ],
)
async def test_a_server_that_speaks_something_else_fails_the_call_and_nothing_else(said):
    async def misbehave(reader, writer):
        await reader.read(100)
        writer.write(said)
        writer.close()

    failed = await failure(misbehave)
    assert (failed.code, failed.lost) == (grpc.StatusCode.UNAVAILABLE, True)


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0", b"\0\0\0\0\5abc"], ids=["none", "half a prefix", "too short"])
async def test_an_answer_that_is_no_message_is_a_fault_of_the_server(body):
    async def answer(reader, writer):
        writer.write(frame(h2.SETTINGS, 0, 0))
        await reader.readuntil(b"\0\0\0\0\1x")
        block = hpack.Encoder().encode([(":status", "200"), ("grpc-status", "0")])
        writer.write(frame(h2.DATA, 0, 1, body) + frame(h2.HEADERS, 0x5, 1, block))
        writer.close()

    failed = await failure(answer)
    assert (failed.code, failed.lost) == (grpc.StatusCode.INTERNAL, False)


class Transport:
    def __init__(self):
        self.written = b""
        self.closed = False

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    abort = close


RESPONSE = (
    frame(4, 0, 0)
    + frame(h2.HEADERS, 0x4, 1, b"\x88")  # :status 200
    + frame(h2.PING, 0, 0, b"12345678")
    + frame(h2.DATA, 0, 1, b"\0\0\0\0\x03a")
    + frame(h2.DATA, 0x8, 1, b"\x02bc\0\0")  # padded
    + frame(h2.HEADERS, 0x1, 1, b"\x00\x0bgrpc-")
    + frame(h2.CONTINUATION, 0x4, 1, b"status\x010")
)


@pytest.mark.parametrize(
    "wrong",
    [frame(h2.DATA, 0x8, 1, b"\5"), frame(h2.HEADERS, 0xC, 1, b"\5"), frame(h2.HEADERS, 0x24, 1, b"\0\0")],
    ids=["padding of data", "padding of headers", "priority"],
)
async def test_a_frame_too_short_for_its_padding_or_priority_ends_the_connection(wrong):
    connection, transport = Connection(lambda _: None), Transport()
    connection.connection_made(transport)
    ended = []
    connection.request(b"headers", b"body", ended.append)
    connection.data_received(frame(h2.SETTINGS, 0, 0) + wrong)
    (stream,) = ended
    assert isinstance(stream.error, ConnectionLostError)
    assert transport.closed


@given(st.lists(st.integers(1, 40)))
async def test_frames_may_come_in_any_pieces(sizes):
    connection, transport = Connection(lambda _: None), Transport()
    connection.connection_made(transport)
    ended = []
    connection.request(b"headers", b"body", ended.append)
    position = 0
    for size in [*sizes, len(RESPONSE)]:
        connection.data_received(RESPONSE[position : position + size])
        position += size
    (stream,) = ended
    assert stream.error is None
    assert stream.headers == {":status": "200", "grpc-status": "0"}
    assert b"".join(stream.pieces) == b"\0\0\0\0\x03abc"


async def test_a_request_waits_for_the_room_that_the_server_gives():
    connection, transport = Connection(lambda _: None), Transport()
    connection.connection_made(transport)
    connection.data_received(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 10)))
    transport.written = b""
    connection.request(b"", b"x" * 25, print)
    assert transport.written.count(b"x") == 10
    connection.data_received(h2.window_update(1, 10))
    assert transport.written.count(b"x") == 20
    connection.data_received(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 15)))
    assert transport.written.endswith(frame(h2.DATA, 0x1, 1, b"x" * 5))


async def test_a_server_that_leaves_has_what_it_did_not_see_sent_elsewhere():
    connection, transport = Connection(lambda _: None), Transport()
    connection.connection_made(transport)
    seen, unseen = [], []
    connection.request(b"", b"", seen.append)
    connection.request(b"", b"", unseen.append)
    connection.data_received(frame(h2.GOAWAY, 0, 0, struct.pack(">II", 1, 0)))
    assert not connection.is_open
    assert "leaving" in str(unseen[0].error)
    assert not seen
    assert not transport.closed
    connection.data_received(frame(h2.HEADERS, 0x5, 1, b"\x88"))
    assert seen[0].error is None
    assert transport.closed


async def serve(handler, tls):
    """A grpc.aio server of METHOD, and its address."""
    server = grpc.aio.server()
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)])
    address = free_address()
    server.add_secure_port(address, tls)
    await server.start()
    return server, address


class Wire(asyncio.Transport):
    """Keeps the frames that a client writes, as (kind, stream)."""

    def __init__(self):
        super().__init__()
        self.frames = []

    def write(self, data):
        data = data.removeprefix(h2.PREFACE)
        while data:
            length = int.from_bytes(data[:3], "big")
            self.frames.append((data[3], int.from_bytes(data[5:9], "big")))
            data = data[9 + length :]

    def opened(self):
        return [stream for kind, stream in self.frames if kind == h2.HEADERS]


async def test_requests_beyond_the_servers_stream_limit_wait_for_a_stream():
    wire, ended = Wire(), []
    connection = Connection(lambda _: None)
    connection.connection_made(wire)
    connection.data_received(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 3, 2)))
    first, second, third, fourth = (connection.request(b"", b"body", ended.append) for _ in range(4))
    assert wire.opened() == [first, second]
    connection.cancel(third)
    assert (h2.RST_STREAM, third) not in wire.frames
    connection.data_received(frame(h2.HEADERS, 0x5, first))
    await asyncio.sleep(0)
    assert wire.opened() == [first, second, fourth]
    connection.data_received(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 3, 4)))
    assert wire.opened() == [first, second, fourth]
    connection.connection_lost(None)
    assert len(ended) == 3


async def test_calls_go_over_tls_to_a_server_whose_certificate_names_the_host():
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())

    async def handler(request, context):
        return request

    server, address = await serve(handler, grpc.ssl_server_credentials([pair]))
    trusting, wary = ssl.create_default_context(), ssl.create_default_context()
    authority.configure_trust(trusting)
    for context in (trusting, wary):
        context.set_alpn_protocols(["h2"])
    channel, stranger = (GrpcChannel(address, SimpleNamespace(context=each)) for each in (trusting, wary))
    try:
        assert await asyncio.wait_for(channel.call(METHOD, bytes(100_000)), 60) == bytes(100_000)
        with pytest.raises(CallError, match="certificate verify failed") as caught:
            await asyncio.wait_for(stranger.call(METHOD, b""), 60)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    finally:
        channel.drop()
        stranger.drop()
        await server.stop(0)
