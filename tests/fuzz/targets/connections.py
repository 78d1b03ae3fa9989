"""Streams of bytes from other processes: the same stream means the same however it is cut into pieces."""

import asyncio
import struct

import grpc
import hpack

from cache.tiers.redis_connection import AwaitedCommand, RedisConnection
from router.transport.http2 import Connection
from router.transport.local_channel import LocalConnection
from services.inference.api.envelope_socket import EnvelopeSocket, _EnvelopeConnection
from services.runtime.frames import ANSWER, CALL, FAILURE, PART
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc import http2_connection, http2_frames
from services.runtime.rpc.native_server import NativeServer
from services.runtime.rpc.rpc import Answer
from tests.fuzz.target import target
from tests.system.raw_http2 import frame

_LOOP = asyncio.new_event_loop()


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written = bytearray()
        self.is_aborted = False

    def write(self, data):
        self.written += data

    def writelines(self, parts):
        self.written += b"".join(parts)

    def abort(self):
        self.is_aborted = True

    def close(self):
        self.is_aborted = True

    def is_closing(self):
        return self.is_aborted

    def get_write_buffer_size(self):
        return 0

    def set_write_buffer_limits(self, high=None, low=None):
        pass


def fed(make, data, size):
    """What `make()` has seen after `data` in pieces of `size`; nothing is fed to a connection that was cut."""

    async def feed():
        protocol, seen = make()
        transport = Transport()
        protocol.connection_made(transport)
        for start in range(0, len(data), size):
            if transport.is_aborted:
                break
            protocol.data_received(data[start : start + size])
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        return seen(), transport.is_aborted

    return _LOOP.run_until_complete(feed())


def equal_in_pieces(make, data):
    whole = fed(make, data, max(1, len(data)))
    assert fed(make, data, 7) == whole
    return whole


_HEADERS = hpack.Encoder().encode([(":status", "200"), ("grpc-status", "0")], huffman=False)
_SETTINGS = struct.pack(">HIHI", 3, 1, 5, 16384)
_ANSWERED = frame(1, 4, 1, _HEADERS) + frame(0, 0, 1, b"\0\0\0\0\2ok") + frame(1, 5, 1, _HEADERS)


def _client():
    connection = Connection(lambda _: None)
    ended = []

    def seen():
        return [
            (stream.headers, b"".join(stream.pieces), type(stream.error).__name__) for stream in ended
        ], connection.is_open

    made = connection.connection_made

    class Started:
        """The connection, with two requests under way."""

        def connection_made(self, transport):
            made(transport)
            connection.request(b"\x82", b"body", ended.append)
            connection.request(b"\x82", bytes(100_000), ended.append)

        data_received = staticmethod(connection.data_received)

    return Started(), seen


@target(
    "http2-client",
    [
        frame(4, 0, 0, _SETTINGS) + frame(4, 1, 0) + _ANSWERED,
        frame(1, 0, 1, _HEADERS[:1])
        + frame(9, 4, 1, _HEADERS[1:])
        + frame(8, 0, 3, b"\0\0\xff\xff")
        + frame(3, 0, 3, bytes(4)),
        frame(6, 0, 0, bytes(8))
        + frame(7, 0, 0, bytes(8))
        + frame(0, 9, 1, b"\1x\0")
        + frame(1, 0x2D, 1, b"\1" + bytes(5)),
    ],
)
def http2_client(data):
    """Of a worker's side of a connection."""
    equal_in_pieces(_client, data)


def _head(path):
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), ("content-type", "application/grpc")]
    return hpack.Encoder().encode(fields, huffman=False)


_REQUEST, _CHAT = _head("/t.T/M"), _head("/t.T/S")
_OPENED = http2_frames.PREFACE + frame(4, 0, 0, _SETTINGS)


def _native():
    seen = []

    async def path(data, metadata, deadline):
        seen.append((bytes(data), metadata))
        return Answer(data, ())

    async def chat(messages, context):
        async for message in messages:
            yield message

    server = NativeServer({"/t.T/M": path}, 1000)
    handlers = {"M": fast_path_handler(path), "S": grpc.stream_stream_rpc_method_handler(chat)}
    server.add_registered_method_handlers("t.T", handlers)
    connection = http2_connection.Connection(server)

    def over():
        connection.connection_lost(None)
        assert (connection._streams, connection._blocked, connection._unsent) == ({}, {}, 0)
        assert (server.request_bytes, server._connections) == (0, {})
        return seen

    return connection, over


@target(
    "http2-server",
    [
        _OPENED
        + frame(1, 4, 1, _REQUEST)
        + frame(0, 1, 1, b"\0\0\0\0\2ok")
        + frame(1, 5, 3, b"\xbe")
        + frame(6, 0, 0, bytes(8)),
        _OPENED
        + frame(1, 4, 1, _CHAT)
        + frame(0, 8, 1, b"\1\0\0\0\0\1x\0\0\0\0\0\0")
        + frame(1, 0, 3, _REQUEST[:9])
        + frame(9, 4, 3, _REQUEST[9:])
        + frame(3, 0, 3, bytes(4))
        + frame(8, 0, 1, b"\0\0\xff\xff")
        + frame(0, 1, 1, b""),
        _OPENED
        + frame(1, 0x2C, 1, b"\1" + bytes(5) + _REQUEST + b"\0")
        + frame(0, 0, 1, b"\0\0\0\xff\xff")
        + frame(4, 1, 0),
    ],
)
def http2_server(data):
    """Of a client's side of a connection."""
    equal_in_pieces(_native, data)


def _frame(kind, number, payload=b""):
    return struct.pack(">IBI", len(payload), kind, number) + payload


def _local():
    connection = LocalConnection()
    answers = []

    class Started:
        """The connection, with two envelopes under way."""

        def connection_made(self, transport):
            connection.connection_made(transport)
            connection.begin([b"one"], lambda answer: answers.append((0, _text(answer))))
            connection.begin([b"two"], lambda answer: answers.append((1, _text(answer))))

        data_received = staticmethod(connection.data_received)

    return Started(), lambda: sorted(answers)


def _text(answer):
    return answer if isinstance(answer, bytes) else repr(answer)


@target(
    "frames-of-worker",
    [
        _frame(PART, 0, b"a") + _frame(ANSWER, 0, b"b") + _frame(FAILURE, 1, b"\x0ewhy"),
        _frame(4, 0) + _frame(FAILURE, 0, b"\xff\xff") + _frame(ANSWER, 1) + _frame(9, 9),
    ],
)
def frames_of_worker(data):
    equal_in_pieces(_local, data)


def _server():
    seen = []

    async def execute(payload, metadata, deadline):
        seen.append(bytes(payload))
        return Answer(b"answer", ())

    return _EnvelopeConnection(EnvelopeSocket("", execute, 100, seen.append)), lambda: seen


@target("frames-of-router", [_frame(CALL, 7, b"request") + _frame(1, 7), _frame(CALL, 1, bytes(101)) + _frame(CALL, 2)])
def frames_of_router(data):
    equal_in_pieces(_server, data)


@target(
    "redis-replies",
    [
        b"$3\r\nabc\r\n$-1\r\n-MOVED 5 a:1\r\n-ERR no\r\n+OK\r\n",
        b"_\r\n>1\r\n+x\r\n%1\r\n+a\r\n:1\r\n-ASK 1 b:\r\n-MOVED 1\r\n-READONLY\r\n",
        b"*1\r\n" * 20 + b"$99999999999\r\n",
    ],
)
def redis_replies(data):
    """Each command ends once, whatever the server says."""

    def make():
        lost = []
        connection = RedisConnection(60.0, lambda _, error: lost.append(str(error)))
        commands = [AwaitedCommand(1) for _ in range(4)]
        for command in commands:
            connection.send(command, (b"GET",))

        class Started:
            """The connection, with commands under way."""

            def connection_made(self, transport):
                pass

            def data_received(self, data):
                if not connection.is_over:
                    connection.data_received(data)

        def seen():
            connection.close()
            assert len(lost) <= 1
            return [repr(command.reply.result()) for command in commands], [error.split("(")[0] for error in lost]

        return Started(), seen

    equal_in_pieces(make, data)
