"""HTTPS of the console and of /metrics: who is answered, and files that are replaced while they serve."""

import asyncio
import contextlib
import http.client
import socket
import ssl
from dataclasses import replace as with_other

import pytest
from cryptography import x509
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from services.console.data import scraper
from services.console.data.history import History
from services.console.http_server import HttpServer
from services.console.settings import ConsoleSettings
from services.runtime.process.process import publish
from services.runtime.rpc.exposition import MetricsServer
from services.runtime.rpc.server import StartError
from services.runtime.rpc.service_tls import ServiceTls
from services.runtime.rpc.tls import TlsError, TlsFiles
from services.runtime.telemetry.metrics import Metrics
from tests.certificates import Ca, replace
from tests.ports import free_port


@pytest.fixture
def ca():
    return Ca()


@pytest.fixture
def files(tmp_path, ca):
    ca.issue("127.0.0.1", "spiffe://example.org/router").write(tmp_path)
    replace(tmp_path / "ca.pem", ca.pem)
    return TlsFiles(tmp_path / "server.pem", tmp_path / "server-key.pem", tmp_path / "ca.pem")


@contextlib.asynccontextmanager
async def metrics(files):
    server = MetricsServer("127.0.0.1:0", Metrics(), files)
    yield await server.start()
    server.close()


@contextlib.asynccontextmanager
async def console(files):
    async def site(scope, receive, send):
        await PlainTextResponse(Request(scope).url.scheme)(scope, receive, send)

    port = free_port()
    server = HttpServer(site, f"127.0.0.1:{port}", files)
    server.start()
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):  # not listening yet
            await asyncio.sleep(0)
    yield port
    await server.stop(5)


both = pytest.mark.parametrize("serving", [metrics, console])


def client(ca, certificate=None, folder=None):
    """What a client believes in, and shows."""
    context = ssl.create_default_context(cadata=ca.pem.decode())
    if certificate is not None:
        context.load_cert_chain(replace(folder / "client.pem", certificate.certificate + certificate.key))
    return context


async def get(port, context):
    """(status, serial number of the certificate); the status is 0 without an answer."""

    def ask():
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
        try:
            connection.connect()
            serial = x509.load_der_x509_certificate(connection.sock.getpeercert(True)).serial_number
            connection.request("GET", "/metrics")
            return connection.getresponse().status, serial
        except (OSError, http.client.HTTPException):
            return 0, 0
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


@both
async def test_plain_text_and_foreign_certificates_are_not_answered(serving, files, ca, tmp_path):
    async with serving(files) as port:
        assert (await get(port, client(ca, ca.issue("scraper"), tmp_path)))[0] == 200
        for stranger in (client(ca), client(ca, Ca().issue("scraper"), tmp_path), client(Ca())):
            assert (await get(port, stranger))[0] == 0
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()


@both
async def test_browsers_need_no_certificate_without_a_ca_of_clients(serving, files, ca):
    async with serving(with_other(files, client_ca=None)) as port:
        assert (await get(port, client(ca)))[0] == 200


@both
async def test_new_connections_have_the_files_that_are_there(serving, files, ca, tmp_path, caplog):
    old, other = ca.issue("scraper"), Ca()
    async with serving(files) as port:
        status, first = await get(port, client(ca, old, tmp_path))
        issued = ca.issue("127.0.0.1")
        replace(files.certificate, issued.certificate)
        assert await get(port, client(ca, old, tmp_path)) == (status, first)  # without its key
        assert "stay as they were" in caplog.text
        replace(files.key, issued.key)
        assert await get(port, client(ca, old, tmp_path)) == (200, issued.serial)
        replace(files.client_ca, other.pem)
        assert await get(port, client(ca, old, tmp_path)) == (0, 0)
        assert (await get(port, client(ca, other.issue("scraper"), tmp_path)))[0] == 200


@both
async def test_a_server_with_unusable_files_does_not_start(serving, files):
    files.certificate.unlink()
    with pytest.raises(TlsError, match=r"cannot read .*server\.pem"):
        async with serving(files):
            pass


@both
async def test_no_connection_resumes_the_session_of_an_earlier_one(serving, files, ca, tmp_path):
    def resumed(port, context):
        session = None
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", port)) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as connection,
            ):
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert connection.recv(4) == b"HTTP"  # what may be resumed has come too
                session, is_reused = connection.session, connection.session_reused
        return is_reused

    async with serving(files) as port:
        context = client(ca, ca.issue("scraper"), tmp_path)
        assert await asyncio.to_thread(resumed, port, context) is False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError, match="SSL"):
            await asyncio.to_thread(resumed, port, context)


async def test_services_with_certificates_serve_metrics_by_mutual_tls_and_the_console_scrapes_them(files, monkeypatch):
    monkeypatch.setattr(scraper, "_TIMEOUT", 60.0)
    settings = ConsoleSettings(service_certificate=files.certificate, service_key=files.key, service_ca=files.client_ca)
    port = free_port()
    exposition = await publish(settings.model_copy(update={"metrics_address": f"127.0.0.1:{port}"}), Metrics())
    found = {}
    for name, tls in (("plain", None), ("mutual", ServiceTls(files))):
        history, read = History(lambda: 0.0), asyncio.Event()
        scraping = scraper.Scraper({name: f"127.0.0.1:{port}"}, history, tls)
        history.add = lambda *_, read=read: read.set()
        scraping.start()
        while not read.is_set() and not scraping.problems:
            await asyncio.sleep(0.01)
        found[name] = (read.is_set(), *scraping.problems)
        scraping.close()
    exposition.close()
    assert found == {"plain": (False, "plain"), "mutual": (True,)}


def test_the_console_takes_spans_of_its_host_in_plain_text_and_others_by_tls_only(files):
    named = {"tls_certificate": files.certificate, "tls_key": files.key}
    here = ConsoleSettings(**named)
    assert here.tls_files() == with_other(files, client_ca=None)
    assert here.tls() is None
    with pytest.raises(StartError, match="the engine native has no TLS"):
        ConsoleSettings(**named, address="0.0.0.0:8013").tls()
    assert ConsoleSettings(**named, address="0.0.0.0:8013", engine="grpcio").tls() is not None
    with pytest.raises(StartError, match="needs both"):
        ConsoleSettings(tls_key=files.key).tls_files()
