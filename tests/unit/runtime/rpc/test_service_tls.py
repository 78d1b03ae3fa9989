"""Mutual TLS between services: both kinds of channels, a service known by its certificate, and rotation."""

import asyncio

import grpc
import pytest

from router.transport.grpc_channel import CallError, GrpcChannel
from services.runtime.rpc import service_tls
from services.runtime.rpc.access import Access
from services.runtime.rpc.server import Engine, Server
from services.runtime.rpc.service_tls import ServiceTls, open_channel
from services.runtime.rpc.tls import TlsError, TlsFiles
from tests.certificates import Ca, replace
from tests.unit.runtime.rpc.test_access import services

ROUTER, OTHER = "spiffe://example.org/router", "spiffe://example.org/other"
FETCH = "/ringmesh.cache.v1.CacheService/Fetch"  # of services only


@pytest.fixture
def ca():
    return Ca()


@pytest.fixture
async def server(tmp_path, ca):
    """Its address, and its files."""
    folder = tmp_path / "server"
    folder.mkdir()
    ca.issue("127.0.0.1").write(folder)
    files = TlsFiles(folder / "server.pem", folder / "server-key.pem", replace(folder / "ca.pem", ca.pem))
    access = Access("0.0.0.0:1", (), verifies_certificates=True, services=frozenset([ROUTER]))
    limits = {"max_message_bytes": 1 << 20, "max_connection_age": 300}
    started = Server(Engine.GRPCIO, "127.0.0.1:0", list(services()), access=access, tls=files, **limits)
    yield f"127.0.0.1:{await started.start()}", files
    await started.stop(0)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Writes a service's files: client(its CA, its name, the CA of others). Returns them."""
    monkeypatch.setattr(service_tls, "_LOOK_SECONDS", 0)

    def write(ca, name, others):
        certificate, key = ca.issue(name).write(tmp_path)
        return TlsFiles(certificate, key, replace(tmp_path / "ca.pem", others))

    return write


async def codes(address, tls):
    """Of a call over both kinds of channels. grpc.aio answers INTERNAL now and then if a call is refused at once."""
    own = GrpcChannel(address, tls)
    try:
        await own.call(FETCH, b"")
        found = ["OK"]
    except CallError as error:
        found = [error.code.name]
    finally:
        own.drop()
    channel = open_channel(address, [("grpc.use_local_subchannel_pool", 1)], tls=tls)
    try:
        await channel.unary_unary(FETCH)(b"")
        found.append("OK")
    except grpc.aio.AioRpcError as error:
        found.append("PERMISSION_DENIED" if error.code() is grpc.StatusCode.INTERNAL else error.code().name)
    await channel.close()
    return found


async def test_the_certificate_of_a_service_is_its_identity(server, client, ca):
    address, _ = server
    assert await codes(address, ServiceTls(client(ca, ROUTER, ca.pem))) == ["OK", "OK"]
    assert await codes(address, ServiceTls(client(ca, OTHER, ca.pem))) == ["PERMISSION_DENIED"] * 2
    assert await codes(address, ServiceTls(client(Ca(), ROUTER, ca.pem))) == ["UNAVAILABLE"] * 2
    assert await codes(address, ServiceTls(client(ca, ROUTER, Ca().pem))) == ["UNAVAILABLE"] * 2


async def test_a_server_must_have_the_name_of_the_host(server, client, ca, tmp_path):
    address, files = server
    ca.issue("other.example.org").write(files.certificate.parent)
    assert await codes(address, ServiceTls(client(ca, ROUTER, ca.pem))) == ["UNAVAILABLE"] * 2


async def test_certificates_and_cas_are_replaced_in_use_and_no_call_fails(server, client, ca, tmp_path):
    address, files = server
    tls = ServiceTls(client(ca, ROUTER, ca.pem))
    own, channel = GrpcChannel(address, tls), open_channel(address, (), tls=tls)
    method = channel.unary_unary(FETCH)
    done = asyncio.Event()
    calls = 0

    async def call_all_the_time():
        nonlocal calls
        while not done.is_set():
            fresh = GrpcChannel(address, tls)
            await asyncio.gather(own.call(FETCH, b""), fresh.call(FETCH, b""), method(b""))
            fresh.drop()
            calls += 1

    async def after_some_calls():
        before = calls
        while calls < before + 5 and not caller.done():
            await asyncio.sleep(0)

    caller = asyncio.create_task(call_all_the_time())
    await after_some_calls()
    other = Ca()
    # Everybody trusts both CAs, then has certificates of the new one, then trusts only that.
    for path in (files.client_ca, tmp_path / "ca.pem"):
        replace(path, ca.pem + other.pem)
        await after_some_calls()
    other.issue("127.0.0.1").write(files.certificate.parent)
    await after_some_calls()
    issued = other.issue(ROUTER)
    replace(tmp_path / "server.pem", issued.certificate)
    await after_some_calls()  # without its key
    replace(tmp_path / "server-key.pem", issued.key)
    await after_some_calls()
    for path in (files.client_ca, tmp_path / "ca.pem"):
        replace(path, other.pem)
        await after_some_calls()
    done.set()
    await caller
    own.drop()
    await channel.close()
    assert await codes(address, tls) == ["OK", "OK"]


def test_files_that_cannot_be_used_are_named(client, ca, tmp_path):
    files = client(ca, ROUTER, ca.pem)
    (tmp_path / "server-key.pem").unlink()
    with pytest.raises(TlsError, match=r"cannot read .*server-key\.pem"):
        ServiceTls(files)


class Wire:
    """Carries bytes between clients and a server at `port`, until `cut`: then none arrive, and no connection ends."""

    def __init__(self, port):
        self._port = port
        self._is_cut = False

    async def open(self):
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self):
        self._is_cut = True

    async def _carry(self, reader, writer):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader, writer):
        while data := await reader.read(1 << 16):
            if not self._is_cut:
                writer.write(data)
        writer.close()


async def test_a_stream_from_a_host_that_vanished_ends(monkeypatch):
    pings = (("grpc.keepalive_time_ms", 200), ("grpc.http2.ping_timeout_ms", 200))
    monkeypatch.setattr(service_tls, "_KEEPALIVE", (*pings, *service_tls._KEEPALIVE[2:]))

    async def watch(_, __):
        yield b"first"
        await asyncio.Event().wait()

    server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 100)])
    handlers = {"Watch": grpc.unary_stream_rpc_method_handler(watch)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
    wire = Wire(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    channel = open_channel(await wire.open(), ())
    stream = channel.unary_stream("/s/Watch")(b"")
    assert await stream.read() == b"first"
    wire.cut()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await asyncio.wait_for(stream.read(), 60)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    await channel.close()
    await server.stop(0)
