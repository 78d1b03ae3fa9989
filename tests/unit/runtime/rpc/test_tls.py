"""TLS of the grpcio engine itself, over real connections, and what a server believes of a caller's certificate."""

import asyncio
import contextlib
import socket
import ssl
import threading

import grpc
import pytest
from cryptography import x509

from services.runtime.oip.protocol import caller_metadata, identify
from services.runtime.rpc.access import LOOPBACK, PEER, Access
from services.runtime.rpc.api_keys import ApiKeys
from services.runtime.rpc.client_certificate import CLIENT_CERTIFICATE, header, names
from services.runtime.rpc.server import Engine, Server
from services.runtime.rpc.tls import TlsError, TlsFiles
from tests.certificates import Ca, replace
from tests.unit.runtime.rpc.test_access import services

LOCAL = [("grpc.use_local_subchannel_pool", 1)]
APP = "spiffe://example.org/app"
READ = "/inference.GRPCInferenceService/RepositoryIndex"


@pytest.fixture
def ca():
    return Ca()


@pytest.fixture
def files(tmp_path, ca):
    ca.issue("127.0.0.1").write(tmp_path)
    replace(tmp_path / "ca.pem", ca.pem)
    return TlsFiles(tmp_path / "server.pem", tmp_path / "server-key.pem", tmp_path / "ca.pem")


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.jsonl").write_text(
        f'{{"id": "app", "certificate": "{APP}", "tenant": "acme", "roles": ["infer"]}}\n'
        '{"id": "reader", "certificate": "reader.example.org", "roles": ["read"]}\n'
    )
    return ApiKeys(tmp_path / "keys.jsonl")


@contextlib.asynccontextmanager
async def serving(files, keys=None):
    access = Access("127.0.0.1:0", (), keys=keys, verifies_certificates=files.client_ca is not None)
    server = Server(
        Engine.GRPCIO,
        "127.0.0.1:0",
        list(services()),
        max_message_bytes=1 << 20,
        max_connection_age=300,
        access=access,
        tls=files,
    )
    port = await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def channel(address, ca, client=None):
    pair = (client.key, client.certificate) if client is not None else (None, None)
    # Sessions of other channels would be resumed, without a look at the certificate.
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.pem, *pair), LOCAL)


def call(channel, metadata=()):
    """The status of a call."""
    try:
        channel.unary_unary(READ)(b"", metadata=metadata)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


async def code(address, ca, client=None, metadata=()):
    """The status of a call over a connection of its own."""

    def once():
        with channel(address, ca, client) as to:
            return call(to, metadata)

    return await asyncio.to_thread(once)


async def test_the_names_in_a_verified_certificate_decide_what_its_holder_may_do(files, ca, keys):
    forged = ((CLIENT_CERTIFICATE, "DNS=reader.example.org"),)
    async with serving(files, keys) as address:
        for name, metadata, expected in (
            ("reader.example.org", (), "OK"),
            (APP, (), "PERMISSION_DENIED"),
            (APP, forged, "PERMISSION_DENIED"),
            ("unknown.example.org", (), "UNAUTHENTICATED"),
            ("unknown.example.org", forged, "UNAUTHENTICATED"),
        ):
            assert await code(address, ca, ca.issue(name), metadata) == expected
        assert await code(address, ca, metadata=forged) == "UNAVAILABLE"
        assert await code(address, ca, Ca().issue("reader.example.org")) == "UNAVAILABLE"


async def test_unchanged_certificates_are_not_read_again(files, ca, caplog):
    caplog.set_level("INFO")
    async with serving(files) as address:
        assert await code(address, ca, ca.issue("reader.example.org")) == "OK"
    assert "read again" not in caplog.text


async def test_certificates_are_replaced_under_traffic_and_no_call_fails(files, ca, tmp_path):
    old = ca.issue("reader.example.org")
    async with serving(files) as address:
        found, done = [], threading.Event()

        def call_all_the_time():
            with channel(address, ca, old) as kept:
                while not done.is_set():
                    with channel(address, ca, old) as fresh:
                        found.extend([call(kept), call(fresh)])

        async def after_some_calls():
            before = len(found)
            while len(found) < before + 4 and not caller.done():
                await asyncio.sleep(0.001)

        caller = asyncio.create_task(asyncio.to_thread(call_all_the_time))
        for _ in range(5):
            issued = ca.issue("127.0.0.1")
            replace(tmp_path / "server.pem", issued.certificate)
            # The key of another certificate, for a moment: the server keeps what it had.
            await after_some_calls()
            replace(tmp_path / "server-key.pem", issued.key)
            await after_some_calls()
            assert await asyncio.to_thread(serial, address, ca, old, tmp_path) == issued.serial
        done.set()
        await caller
        assert {*found} == {"OK"}
        # The CA of callers too.
        other = Ca()
        replace(tmp_path / "ca.pem", other.pem)
        assert await code(address, ca, old) == "UNAVAILABLE"
        assert await code(address, ca, other.issue("reader.example.org")) == "OK"


def serial(address, ca, client, folder):
    """Of the certificate that the server shows."""
    context = ssl.create_default_context(cadata=ca.pem.decode())
    (folder / "client.pem").write_bytes(client.certificate + client.key)
    context.load_cert_chain(folder / "client.pem")
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(True)).serial_number


@pytest.mark.parametrize("missing", ["server.pem", "server-key.pem", "ca.pem"])
def test_files_that_cannot_be_used_are_named(files, tmp_path, missing):
    files.check()
    (tmp_path / missing).write_text("nonsense")
    with pytest.raises(TlsError, match=missing):
        files.check()
    (tmp_path / missing).unlink()
    with pytest.raises(TlsError, match=f"cannot read .*{missing}"):
        files.check()


def test_the_key_must_be_that_of_the_certificate(files, ca, tmp_path):
    replace(tmp_path / "server-key.pem", ca.issue("127.0.0.1").key)
    with pytest.raises(TlsError, match="not a certificate and its key"):
        files.check()


async def test_a_server_with_unusable_files_does_not_start(files, tmp_path):
    (tmp_path / "server.pem").unlink()
    with pytest.raises(TlsError, match=r"cannot read .*server\.pem"):
        async with serving(files):
            pass


def identified(address, keys, *metadata):
    said = caller_metadata(metadata)
    identify(said, Access(address, LOOPBACK, keys=keys))
    return said


def test_only_a_server_behind_the_edge_believes_the_certificate_header(keys):
    sent = (CLIENT_CERTIFICATE, f"Hash=ab;URI={APP};DNS=app.example.org")
    assert identified("unix:/run/router.sock", keys, sent).tenant == "acme"
    assert identified("127.0.0.1:8001", keys, sent).error is not None
    # Not a name that someone wrote where a key belongs, even after the certificate was seen.
    keys.certified(sent[1])
    assert identified("unix:/run/router.sock", keys, ("authorization", sent[1])).error is not None


@pytest.mark.parametrize("value", ["", "URI=", "URI=;DNS=", f"URI={APP},URI=spiffe://example.org/b", f"By={APP}", APP])
def test_a_certificate_header_without_one_known_name_is_nobody(keys, value):
    assert identified("unix:/run/router.sock", keys, (CLIENT_CERTIFICATE, value)).error is not None


def test_a_name_cannot_smuggle_in_another():
    assert names(header(["a.example.org", "spiffe://x/a;DNS=b", "b,DNS=c", APP])) == ["a.example.org", APP]


def test_behind_the_edge_the_network_is_that_of_its_caller():
    load = "inference.GRPCInferenceService/RepositoryModelLoad"
    check = Access("unix:/run/router.sock").guard(load)
    local, remote = ((PEER, "127.0.0.1:5"),), ((PEER, "10.0.0.1:5"),)
    assert check(local, "unix:1", b"") == check((), "unix:1", b"") == "local"
    assert check((*local, (CLIENT_CERTIFICATE, "URI=spiffe://x/y")), "unix:1", b"") == "local"
    for refused in (remote, ((PEER, "[2001:db8::1]:5"),), (*local, ("x-forwarded-for", "10.0.0.1"))):
        with pytest.raises(Exception, match="is for callers on this host"):
            check(refused, "unix:1", b"")
    # Elsewhere anybody can write that.
    with pytest.raises(Exception, match="is for callers on this host"):
        Access("0.0.0.0:1").guard(load)(local, "ipv4:10.0.0.1:5", b"")
