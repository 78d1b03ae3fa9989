"""TLS in front of a router on the native engine: a real Envoy, real certificates, forged headers, and rotation."""

import http.client
import json
import re
import socket
import ssl
import stat
import subprocess
import threading
import urllib.request
from pathlib import Path

import grpc
import hpack
import numpy as np
import pytest
import ringmesh
import tritonclient.grpc as triton
from cryptography import x509
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.runtime.rpc.access import PEER
from services.runtime.rpc.client_certificate import CLIENT_CERTIFICATE
from services.runtime.rpc.http2_frames import END_HEADERS, HEADERS, SETTINGS
from tests.certificates import Ca, replace
from tests.ports import free_port
from tests.system import processes
from tests.system.conftest import RINGMESH, eventually, start_stack, stop_stack
from tests.system.raw_http2 import frame
from tests.system.test_cache import INFER
from tests.system.test_identity import request

ACME, READER = "spiffe://example.org/acme", "reader.example.org"
LOCAL = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def ca():
    return Ca()


@pytest.fixture(scope="module")
def worker(engine, models):
    started = processes.start("services.inference", models=models, threads=1, engine=engine)
    yield started.address
    processes.kill(started)


@pytest.fixture
def started():
    """Routers, then the Envoy, of start_edge."""
    found = []
    yield found
    processes.stop(*found)


@pytest.fixture
def start_edge(worker, ca, tmp_path, started):
    """Starts routers on Unix sockets and an Envoy in front of them: start_edge(client_ca, routers, **settings). `more`:
    sockets of other servers. Returns the Envoy's address; sockets and files are in tmp_path."""

    def start(client_ca, routers=1, more=(), **settings):
        ca.issue("127.0.0.1").write(tmp_path)
        folder = tmp_path / "edge"
        folder.mkdir(mode=0o700)
        settings = {"audit_log": tmp_path / "audit.jsonl", **settings}
        address = f"127.0.0.1:{free_port()}"
        command = [*RINGMESH, "edge", "--address", address, "--folder", str(folder)]
        for number in range(routers):
            router = folder / f"router-{number}.sock"
            started.append(processes.start("router", address=f"unix:{router}", workers=worker, **settings))
            command += ["--router", str(router)]
        for name in more:
            command += ["--router", str(folder / name)]
        command += ["--tls-certificate", tmp_path / "server.pem", "--tls-key", tmp_path / "server-key.pem"]
        if client_ca is not None:
            command += ["--tls-client-ca", replace(tmp_path / "ca.pem", client_ca.pem)]
        started.append(processes.Started(address, subprocess.Popen(command)))
        eventually(lambda: accepts(address), 60)
        return address

    return start


def accepts(address):
    try:
        socket.create_connection(address.rsplit(":", 1)).close()
    except OSError:
        return False
    return True


def channel(address, ca, client=None):
    """With sessions of its own: a resumed one would not look at certificates."""
    pair = (client.key, client.certificate) if client is not None else (None, None)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.pem, *pair), LOCAL)


def infer(channel, value, metadata=()):
    """(status, whether a hit or a miss)"""
    body = request(value).SerializeToString()
    try:
        _, call = channel.unary_unary(INFER).with_call(body, metadata=metadata, timeout=60)
    except grpc.RpcError as error:
        return error.code().name, ""
    return "OK", dict(call.trailing_metadata()).get("ringmesh-cache", "")


def serial(address, ca, client, folder):
    """Of the certificate that the Envoy shows."""
    context = ssl.create_default_context(cadata=ca.pem.decode())
    context.load_cert_chain(replace(folder / "client.pem", client.certificate + client.key))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(True)).serial_number


def test_tritons_client_calls_through_tls_and_plain_text_is_not_answered(start_edge, ca, tmp_path):
    address = start_edge(None)
    replace(tmp_path / "root.pem", ca.pem)
    client = triton.InferenceServerClient(address, ssl=True, root_certificates=str(tmp_path / "root.pem"))
    sent = triton.InferInput("x", [1, 64], "FP32")
    sent.set_data_from_numpy(np.zeros((1, 64), np.float32))
    assert client.infer("mlp", [sent]).as_numpy("y").shape == (1, 10)
    client.close()
    plain = triton.InferenceServerClient(address)
    with pytest.raises(triton.InferenceServerException):
        plain.infer("mlp", [sent], client_timeout=2)
    plain.close()


def test_our_channel_options_verify_the_name_of_the_routers(start_edge, ca):
    address, credentials = start_edge(None), grpc.ssl_channel_credentials(ca.pem)
    for authority, code in (("127.0.0.1", "OK"), ("ringmesh", "UNAVAILABLE")):
        options = [*ringmesh.channel_options(authority=authority), *LOCAL]
        with grpc.secure_channel(address, credentials, options) as to:
            assert infer(to, 5)[0] == code


def test_requests_after_the_death_of_a_router_go_to_the_other(start_edge, started, ca):
    address = start_edge(None, routers=2)
    with channel(address, ca) as to:
        assert infer(to, 5)[0] == "OK"
        processes.kill(started[0])
        assert {infer(to, 5)[0] for _ in range(20)} == {"OK"}


def test_large_requests_are_unavailable_as_small_ones_are_while_no_router_listens(start_edge, started, ca):
    address = start_edge(None)
    processes.kill(started[0])
    with channel(address, ca) as to:
        codes = set()
        for size in (1, 8 << 20) * 5:
            with pytest.raises(grpc.RpcError) as refused:
                to.unary_unary(INFER)(bytes(size), timeout=60)
            codes.add(refused.value.code().name)
    assert codes == {"UNAVAILABLE"}


@pytest.mark.parametrize(("has_begun", "code"), [(False, "UNAVAILABLE"), (True, "INTERNAL")])
def test_a_router_that_dies_is_unavailable_until_it_has_begun_to_answer(start_edge, ca, tmp_path, has_begun, code):
    """Then Envoy can only reset the stream: docs/operations.md says so."""
    address = start_edge(None, routers=0, more=["dying.sock"])
    with socket.socket(socket.AF_UNIX) as listener, channel(address, ca) as to:
        listener.bind(str(tmp_path / "edge" / "dying.sock"))
        listener.settimeout(60)
        listener.listen()
        call = to.unary_stream(INFER)(bytes(8 << 20), timeout=60)
        with listener.accept()[0] as connection:
            connection.sendall(frame(SETTINGS, 0, 0))
            received = 0
            while received < 32_000:  # of the window of 64 KiB
                received += len(connection.recv(1 << 16))
            if has_begun:
                headers = hpack.Encoder().encode([(":status", "200"), ("content-type", "application/grpc")])
                connection.sendall(frame(HEADERS, END_HEADERS, 1, headers))
                call.initial_metadata()  # has arrived
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    assert refused.value.code().name == code


def test_the_routers_socket_is_for_its_user_only(start_edge, tmp_path):
    start_edge(None)
    for path in (tmp_path / "edge", *(tmp_path / "edge").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_forged_certificate_header_is_not_believed(start_edge, ca, tmp_path):
    keys = tmp_path / "keys.jsonl"
    keys.write_text(
        f'{{"id": "acme", "certificate": "{ACME}", "tenant": "acme", "roles": ["infer"]}}\n'
        f'{{"id": "reader", "certificate": "{READER}", "roles": ["read"]}}\n'
    )
    address = start_edge(ca, api_keys=keys)
    forged = ((CLIENT_CERTIFICATE, f"Hash=00;URI={ACME}"), ("ringmesh-tenant", "acme"))
    with channel(address, ca, ca.issue(ACME)) as acme:
        assert (infer(acme, 5))[0] == "OK"
        assert (infer(acme, 5, (("ringmesh-tenant", "acme"),))) == ("OK", "hit-local")
        assert (infer(acme, 5, (("ringmesh-tenant", "other"),)))[0] == "PERMISSION_DENIED"
    for name, code in ((READER, "PERMISSION_DENIED"), ("unknown.example.org", "UNAUTHENTICATED")):
        with channel(address, ca, ca.issue(name)) as other:
            assert (infer(other, 5))[0] == code
            assert (infer(other, 5, forged))[0] == code
    for client in (None, Ca().issue(ACME)):
        with channel(address, ca, client) as other:
            assert (infer(other, 5, forged))[0] == "UNAVAILABLE"


def test_operators_are_known_by_the_address_that_connects_to_the_envoy(start_edge, ca, tmp_path):
    address = start_edge(None, admin_networks="10.0.0.0/8")
    load = v2.RepositoryModelLoadRequest(model_name="scoped")
    with channel(address, ca) as to:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(to)
        for metadata in ((), ((PEER, "10.0.0.1:5"),), (("x-forwarded-for", "10.0.0.1"),)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.RepositoryModelLoad(load, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {line["peer"].rpartition(":")[0] for line in lines} == {"ipv4:127.0.0.1"}


def test_certificates_and_cas_are_replaced_under_traffic_and_no_request_fails(start_edge, ca, tmp_path):
    client, other = ca.issue(ACME), Ca()
    both = Ca()
    both.pem = ca.pem + other.pem
    address = start_edge(ca)
    stopping, found = threading.Event(), []

    def call_all_the_time():
        credentials = grpc.ssl_channel_credentials(both.pem, client.key, client.certificate)
        with grpc.secure_channel(address, credentials, LOCAL) as kept:
            while not stopping.is_set():
                with grpc.secure_channel(address, credentials, LOCAL) as fresh:
                    found.extend([infer(kept, 6)[0], infer(fresh, 6)[0]])

    def code(client):
        with channel(address, both, client) as to:
            return (infer(to, 6))[0]

    callers = [threading.Thread(target=call_all_the_time) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        # The CAs of callers, then certificates of either CA. The key follows its certificate a moment later.
        replace(tmp_path / "ca.pem", both.pem)
        eventually(lambda: code(other.issue(READER)) == "OK")
        for issuer in (ca, other, ca, other):
            issued = issuer.issue("127.0.0.1")
            replace(tmp_path / "server.pem", issued.certificate)
            before = len(found)
            eventually(lambda: len(found) >= before + 10)  # noqa: B023 - called in this iteration
            replace(tmp_path / "server-key.pem", issued.key)
            eventually(lambda: serial(address, both, client, tmp_path) == issued.serial)  # noqa: B023
    finally:
        stopping.set()
        for caller in callers:
            caller.join()
    assert {*found} == {"OK"}
    replace(tmp_path / "ca.pem", other.pem)
    eventually(lambda: code(client) == "UNAVAILABLE")
    assert code(other.issue(READER)) == "OK"


@pytest.mark.proof
def test_up_with_tls_prints_calls_that_work(models, tmp_path):
    stack = start_stack(tmp_path / "stack", "--tls", "--routers", "2", "--models", str(models), "--drain", "5")
    try:
        grpcurl, tritonclient = re.search(
            r"\ngrpcurl\n(.+?)\n\nits trace\n.+?\n\ntritonclient\n(.+?)\n\nready\n", stack.output, re.DOTALL
        ).groups()
        for call in (grpcurl, tritonclient):
            done = subprocess.run(call, shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
        # Its own processes and commands reach the routers on their sockets.
        listed = subprocess.run([*RINGMESH, "models", "--state", stack.state], capture_output=True, text=True)
        assert "mlp" in listed.stdout, listed.stderr
        # Its console is known by the CA of the stack, and speaks TLS only.
        url = json.loads((Path(stack.state) / "stack.json").read_text())["console"]
        shown = subprocess.run([*RINGMESH, "top", "--once", "--state", stack.state], capture_output=True, text=True)
        assert "2 of 2 workers serve" in shown.stdout, shown.stderr
        assert url.startswith("https://")
        with pytest.raises((OSError, http.client.HTTPException)):
            urllib.request.urlopen(url.replace("https", "http"), timeout=60)
    finally:
        assert stop_stack(stack) == 0
