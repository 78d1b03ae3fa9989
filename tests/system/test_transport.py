"""What callers and networks may do at the level of gRPC and HTTP/2, the same on both engines."""

import asyncio
import itertools
import socket
import struct
import threading
from contextlib import ExitStack, suppress

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.driver import ON_LOOP
from services.runtime.oip import protocol
from services.runtime.rpc import backlog, server
from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.native_server import NativeServer
from services.runtime.rpc.rpc import MAX_METADATA_BYTES, Answer, Failure
from services.runtime.rpc.server import Engine, Server
from tests.system.conftest import eventually
from tests.system.raw_http2 import EMPTY, RawClient, frame

MAX_MESSAGE_BYTES = 4 << 20
INFER, LIVE, STREAM = (
    f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ServerLive", "ModelStreamInfer")
)
CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", INFER),
    (":authority", "x"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
OK, UNIMPLEMENTED, RESOURCE_EXHAUSTED = 0, 12, 8


def changed(name, value):
    return [pair if pair[0] != name else (name, value) for pair in CALL]


class Serving:
    """A server on an event loop of its own, whose ModelInfer answers with what it is sent."""

    def __init__(self, engine, answer=lambda data: Answer(data, ()), handlers=None, address="127.0.0.1:0", **options):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server, self.port = self._run(self._start(engine, answer, handlers or {}, address, options))
        self.address = f"127.0.0.1:{self.port}"

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    async def _start(self, engine, answer, handlers, address, options):
        async def infer(data, metadata, deadline):
            made = answer(data)
            return await made if asyncio.iscoroutine(made) else made

        service = protocol.service(lambda: True, handlers, {"ModelInfer": infer})
        limits = {"max_message_bytes": MAX_MESSAGE_BYTES, "max_connection_age": 3600}
        made = Server(engine, address, [service], **limits, **options)
        port = await made.start()
        made.set_serving(True)
        return made, port

    def counted(self, name):
        return next(sample.value for sample in self.server.calls.samples() if sample.family.name == name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._run(self.server.stop(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module", params=list(Engine))
def serving(request):
    with Serving(request.param) as serving:
        yield serving


@pytest.fixture
def channel(serving):
    with grpc.insecure_channel(serving.address) as channel:
        yield channel


def is_well(serving):
    """Whether another caller is answered."""
    with grpc.insecure_channel(serving.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return channel.unary_unary(INFER)(b"", timeout=60) == b""


def refusal(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=60, **options)
    return caught.value.code(), caught.value.details()


def padded(size):
    """Metadata of so many bytes as they are counted, beside what gRPC libraries say of themselves."""
    return (("x-pad", "a" * (size - 32 - len("x-pad"))),)


@pytest.mark.parametrize("path", [INFER, LIVE])
def test_metadata_up_to_the_limit_is_taken_every_time(channel, path):
    for _ in range(5):
        channel.unary_unary(path)(b"", metadata=padded(MAX_METADATA_BYTES - 512), timeout=60)


@pytest.mark.parametrize("size", [MAX_METADATA_BYTES + 1, 30_000, 60_000])
@pytest.mark.parametrize("path", [INFER, LIVE])
def test_metadata_beyond_the_limit_is_refused_naming_both_sizes(channel, path, size):
    code, details = refusal(channel.unary_unary(path), b"", metadata=padded(size))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the request's metadata has" in details
    assert str(MAX_METADATA_BYTES) in details


def test_metadata_that_the_engine_does_not_read_ends_that_call_alone(serving, channel):
    call = channel.unary_unary(INFER)
    assert call(b"", timeout=60) == b""
    refusal(call, b"", metadata=padded(1 << 20))
    assert is_well(serving)


def test_gzip_is_taken(channel):
    data = v2.ModelInferRequest(model_name="m" * 10_000).SerializeToString()
    assert channel.unary_unary(INFER)(data, compression=grpc.Compression.Gzip, timeout=60) == data


@pytest.mark.parametrize("path", [INFER, LIVE])
def test_deflate_is_unimplemented_and_named(channel, path):
    code, details = refusal(channel.unary_unary(path), bytes(1000), compression=grpc.Compression.Deflate)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "deflate" in details


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_of_the_largest_size_is_served_and_one_more_byte_is_refused(serving, compression):
    with grpc.insecure_channel(serving.address, [("grpc.max_receive_message_length", -1)], compression) as channel:
        infer = channel.unary_unary(INFER)
        assert len(infer(bytes(MAX_MESSAGE_BYTES), timeout=60)) == MAX_MESSAGE_BYTES
        code, details = refusal(infer, bytes(MAX_MESSAGE_BYTES + 1))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert str(MAX_MESSAGE_BYTES) in details
    assert is_well(serving)


@pytest.mark.parametrize("kind", list(Engine))
def test_an_idle_client_may_ping_as_often_as_is_said(kind, monkeypatch):
    monkeypatch.setattr(server, "_PING_MILLISECONDS", 20)
    with Serving(kind) as serving, RawClient(serving.port) as client:
        for _ in range(6):
            threading.Event().wait(0.05)  # the rate is what is tested
            assert client.ping().kind == h2.PING
        client.call(1, CALL)
        assert client.outcome(1) == OK


def test_a_client_learns_how_many_streams_it_may_have(serving):
    with RawClient(serving.port) as client:
        first = client.until(lambda got: got.kind == h2.SETTINGS and got.payload)
        settings = dict(struct.iter_unpack(">HI", first.payload))
        assert settings[3] == 1024


class Held:
    """A server whose calls wait until `release`."""

    def __init__(self, engine):
        self.begun = self.at_once = self.most_at_once = 0
        self._released = asyncio.Event()
        self.serving = Serving(engine, self._answer)

    async def _answer(self, data):
        await ON_LOOP
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self._released.wait()
        self.at_once -= 1
        return Answer(data, ())

    def release(self):
        self.serving.loop.call_soon_threadsafe(self._released.set)


@pytest.fixture(params=list(Engine))
def held(request):
    held = Held(request.param)
    with held.serving:
        yield held


def test_a_connection_has_1024_calls_at_once_and_one_more_is_refused_alone(held):
    with RawClient(held.serving.port) as client:
        client.send(frame(h2.SETTINGS, h2.ACK, 0))
        streams = [2 * number + 1 for number in range(1024)]
        for stream in streams:
            client.call(stream, CALL)
        eventually(lambda: held.begun == 1024)
        client.call(2049, CALL)
        assert client.outcome(2049) == "reset"
        held.release()
        ended = {}
        while len(ended) < 1024:
            got = client.until(lambda got: got.kind == h2.HEADERS and got.flags & h2.END_STREAM)
            ended[got.stream] = int(got.headers["grpc-status"])
        assert ended == dict.fromkeys(streams, OK)
        assert held.begun == 1024
        later = itertools.count(2051, 2)
        eventually(lambda: answered(client, next(later)))  # once the engine has freed their places


def answered(client, stream):
    client.call(stream, CALL)
    return client.outcome(stream) == OK


def test_a_client_queues_the_calls_beyond_1024(held):
    with grpc.insecure_channel(held.serving.address) as channel:
        infer = channel.unary_unary(INFER)
        calls = [infer.future(b"%d" % number, timeout=60) for number in range(1025)]
        eventually(lambda: held.begun == 1024)
        held.release()
        assert [int(call.result()) for call in calls] == [*range(1025)]
    assert held.most_at_once == 1024


@pytest.mark.parametrize(
    ("headers", "outcomes"),
    [
        (CALL, {OK}),
        (changed("content-type", "application/grpc+proto"), {OK}),
        (changed(":path", "/a.B/C"), {UNIMPLEMENTED}),
        (changed(":path", "no-slash"), {UNIMPLEMENTED, "reset"}),
        (changed(":path", ""), {UNIMPLEMENTED, "reset"}),
        ([pair for pair in CALL if pair[0] != ":path"], {"reset"}),
        ([pair for pair in CALL if pair[0] != ":scheme"], {"reset"}),
        (changed("te", "gzip"), {"reset", 13}),
        ([*CALL, ("X-Upper", "1")], {"goaway", "reset", 13}),
        ([*CALL, (":late", "1")], {"goaway", "reset", 13}),
        ([*CALL, ("grpc-timeout", "soon")], {OK, 13}),
        ([*CALL, ("x-bin", "%%%")], {OK, 13}),
        ([*CALL, ("grpc-encoding", "zstd")], {UNIMPLEMENTED, 13}),
        ([*CALL, *((f"x-{number}", "") for number in range(460))], {RESOURCE_EXHAUSTED}),
    ],
    ids=lambda value: str(value)[-60:] if isinstance(value, list) else "",
)
def test_headers_that_are_wrong_end_their_call_and_nobody_elses(serving, headers, outcomes):
    with RawClient(serving.port) as client:
        encoded = [("grpc-encoding", "zstd")]
        client.call(1, headers, b"\1\0\0\0\1x" if headers[-1:] == encoded else EMPTY)
        assert client.outcome(1) in outcomes
    assert is_well(serving)


@pytest.mark.parametrize(
    ("body", "outcomes"),
    [
        (b"\1\0\0\0\1x", {13}),
        (b"\0\xff\xff\xff\xffx", {RESOURCE_EXHAUSTED, 13}),
    ],
)
def test_a_body_that_is_no_message_fails_its_call(serving, body, outcomes):
    with RawClient(serving.port) as client:
        client.call(1, CALL, body)
        assert client.outcome(1) in outcomes
    assert is_well(serving)


def test_streams_that_are_half_open_hold_up_nobody(serving):
    with RawClient(serving.port) as client:
        for stream in range(1, 401, 2):
            client.headers(stream, CALL)
        client.call(401, CALL)
        assert client.outcome(401) == OK
        assert is_well(serving)
    assert is_well(serving)


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(lambda _, number: frame(h2.PING, 0, 0, struct.pack(">Q", number)), id="pings"),
        pytest.param(lambda _, number: frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535 + number)), id="settings"),
        pytest.param(lambda _, number: frame(h2.DATA, 0, 0), id="data without a stream"),
        pytest.param(lambda _, number: frame(h2.CONTINUATION, 0, 1, b""), id="continuations"),
        pytest.param(
            lambda block, number: (
                frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 2 * number + 1, block)
                + h2.reset(2 * number + 1, h2.CANCEL)
            ),
            id="rapid resets",
        ),
    ],
)
def test_a_flood_of_frames_harms_only_its_own_connection(serving, flood):
    with RawClient(serving.port) as client:
        block = client._encoder.encode(CALL)
        try:
            for start in range(0, 3000, 100):
                client.send(b"".join(flood(block, start + number) for number in range(100)))
        except OSError:
            pass  # the server has closed it
        assert is_well(serving)
    assert is_well(serving)


def test_a_window_of_nothing_holds_up_its_own_answers_only(serving):
    with RawClient(serving.port, [(h2.INITIAL_WINDOW_SIZE, 0)]) as client:
        for stream in range(1, 101, 2):
            client.call(stream, CALL, struct.pack(">BI", 0, 1000) + bytes(1000))
        client.until(lambda got: got.kind == h2.HEADERS and got.stream == 99)
        assert is_well(serving)
        # What was held back arrives when there is room.
        for stream in range(1, 101, 2):
            client.send(h2.window_update(stream, 10_000))
        assert client.outcome(99) == OK


async def echo_each(requests, _):
    async for request in requests:
        yield request


@pytest.mark.parametrize("kind", list(Engine))
def test_a_stream_with_a_message_that_is_too_large_says_so_after_it_was_answered(kind):
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(echo_each)}
    with Serving(kind, handlers=handlers) as serving, RawClient(serving.port) as client:
        client.headers(1, changed(":path", STREAM))
        client.send(frame(h2.DATA, 0, 1, EMPTY))
        client.until(lambda got: got.kind == h2.DATA)
        client.send(frame(h2.DATA, 0, 1, struct.pack(">BI", 0, MAX_MESSAGE_BYTES + 1)))
        assert client.outcome(1) == RESOURCE_EXHAUSTED


def test_a_unix_socket_goes_with_its_server_and_not_with_the_one_before(tmp_path):
    path = tmp_path / "socket"
    with ExitStack() as opened:
        with Serving(Engine.NATIVE, address=f"unix:{path}"):
            path.rename(tmp_path / "old")  # as if it were of a process that is gone
            opened.enter_context(Serving(Engine.NATIVE, address=f"unix:{path}"))
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert channel.unary_unary(INFER)(b"x", timeout=60) == b"x"
    assert not path.exists()


def test_a_host_is_served_at_those_of_its_addresses_that_this_machine_has(monkeypatch):
    # 192.0.2.1 is of no machine, as ::1 is where IPv6 is off.
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    server = NativeServer({}, MAX_MESSAGE_BYTES)
    port = server.add_insecure_port("name:0")
    with socket.socket() as client:
        client.connect(("127.0.0.1", port))
    asyncio.run(server.stop_listening())
    del found[1]
    with pytest.raises(RuntimeError, match="Cannot assign requested address"):
        NativeServer({}, MAX_MESSAGE_BYTES).add_insecure_port("name:0")


def test_channelz_names_the_server_and_its_connections():
    with Serving(Engine.NATIVE) as serving, grpc.insecure_channel(serving.address) as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        servers = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=60).server
        number = servers[-1].ref.server_id
        assert (
            stub.GetServer(channelz_pb2.GetServerRequest(server_id=number), timeout=60).server.ref.server_id == number
        )
        ask = channelz_pb2.GetServerSocketsRequest(server_id=number)
        assert len(stub.GetServerSockets(ask, timeout=60).socket_ref) == 1
        code, _ = refusal(stub.GetServer, channelz_pb2.GetServerRequest(server_id=number + 1000))
        assert code is grpc.StatusCode.NOT_FOUND


def test_a_goaway_of_the_client_is_no_fault(serving):
    with RawClient(serving.port) as client:
        client.call(1, CALL)
        client.send(frame(h2.GOAWAY, 0, 0, bytes(8)))
        assert client.outcome(1) in (OK, "goaway", "closed")
    assert is_well(serving)


def test_answers_to_callers_who_leave_meanwhile_are_forgotten():
    with Serving(Engine.NATIVE, lambda data: Answer(data, ())) as serving:
        for _ in range(200):
            with RawClient(serving.port) as client:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                for stream in range(1, 11, 2):
                    client.call(stream, CALL, struct.pack(">BI", 0, 1000) + bytes(1000))
        eventually(lambda: serving.counted("ringmesh_unread_response_bytes") == 0)


# No metadata of gRPC: the native engine sends no answer with it.
BROKEN = (("x", "a\nb"),)


async def on_loop(answer):
    await ON_LOOP
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda: Answer(b"x", BROKEN), id="at once"),
        pytest.param(lambda: on_loop(Answer(b"x", BROKEN)), id="later"),
        pytest.param(lambda: on_loop(Answer(bytes(8 << 20), BROKEN)), id="large"),
        pytest.param(lambda: Failure(grpc.StatusCode.NOT_FOUND, "no", BROKEN), id="a failure"),
    ],
)
def test_an_answer_that_cannot_be_sent_fails_its_own_call(answer):
    with Serving(Engine.NATIVE, lambda data: answer() if data else Answer(b"", ())) as serving:
        with grpc.insecure_channel(serving.address) as channel:
            code, details = refusal(channel.unary_unary(INFER), b"x")
        assert code is grpc.StatusCode.INTERNAL
        assert "ValueError" in details
        assert is_well(serving)
        assert serving.counted("ringmesh_unread_response_bytes") == 0


def test_calls_whose_callers_leave_at_once_are_forgotten():
    with Serving(Engine.NATIVE) as serving:
        for _ in range(100):
            with RawClient(serving.port) as client:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                for stream in range(1, 41, 2):
                    client.call(stream, changed(":path", LIVE))
        assert is_well(serving)
        eventually(lambda: not serving.server._server._under_way)


@pytest.mark.parametrize("kind", list(Engine))
def test_a_stream_that_nobody_reads_ends(kind, monkeypatch):
    monkeypatch.setattr(server, "_READ_SECONDS", 0.1)
    ended = threading.Event()

    async def endless(requests, context):
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            ended.set()

    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(endless)}
    with Serving(kind, handlers=handlers) as serving, RawClient(serving.port) as client:
        client.headers(1, changed(":path", STREAM))
        assert ended.wait(60)


@pytest.mark.parametrize("kind", list(Engine))
def test_answers_that_nobody_reads_are_bounded_and_their_connections_cut_while_others_are_served(kind, monkeypatch):
    monkeypatch.setattr(backlog, "_SHORT_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(server, "_LOOK_SECONDS", 0.1)
    limit, size = 32 << 20, 1 << 20
    window = [(h2.INITIAL_WINDOW_SIZE, 1)]

    def unread():
        return serving.counted("ringmesh_unread_response_bytes")

    with Serving(kind, lambda data: Answer(bytes(size) if data else b"", ()), max_unread_bytes=limit) as serving:
        clients = [RawClient(serving.port, window) for _ in range(6)]
        most = 0
        for stream in range(1, 81, 2):
            for client in clients:
                with suppress(OSError):  # it was cut
                    client.call(stream, CALL, struct.pack(">BI", 0, 1) + b"x")
            most = max(most, unread())
            assert is_well(serving)
        assert most <= 2 * limit
        eventually(lambda: serving.counted("ringmesh_connections_cut_total") > 0 and unread() <= limit)
        assert is_well(serving)
        for client in clients:
            client.socket.close()
        eventually(lambda: unread() == 0)
