"""Secrets that `ringmesh up` and its callers use are in nothing that a full run shows or leaves behind."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import quote, urlencode

import asyncpg
import grpc
import pytest
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.cli.commands import keys
from services.runtime.rpc.access import credential_of
from tests.system import processes
from tests.system.conftest import RINGMESH, eventually, start_stack, stop_stack
from tests.system.ledgers import HOUR_MS, Ledger, now_ms
from tests.system.test_cache import fresh
from tests.unit.runtime.rpc.test_tokens import AUDIENCE, ISSUER, jwks, token
from tests.valkeys import valkey_server

# A stack with everything that has a secret: ten processes.
pytestmark = pytest.mark.proof

REDIS, POSTGRES = "hunter2-of-redis", "hunter2-of-postgres"
PAGES = (
    "/", "/models", "/models/mlp", "/workers/worker-0", "/cache", "/objectives", "/cost", "/try", "/traces", "/audit",
    f"/traces/{7:032x}", f"/compare?a={7:032x}&b={7:032x}", "/api/summary", "/nowhere",
)  # fmt: skip


def tell(port, *commands):
    """A Redis server; each is answered by OK, or ends it."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for command in commands:
            connection.sendall(f"{command}\r\n".encode())
            assert connection.recv(100) in (b"+OK\r\n", b"")


@pytest.fixture
def redis():
    """The port of one with a password."""
    with valkey_server() as server:
        tell(server.port, f"CONFIG SET requirepass {REDIS}")
        yield server.port


class Database:
    """The PostgreSQL of a ledger of its own, which wants the password in `url` from now on."""

    def __init__(self, folder):
        self._ledger = Ledger(state_dir=folder)
        data = Path(folder, "postgres")
        host = quote(str(data), safe="")
        self.url = f"postgresql://ringmesh:{POSTGRES}@/postgres?host={host}"

        async def protect():
            connection = await asyncpg.connect(f"postgresql://ringmesh@/postgres?host={host}")
            await connection.execute(f"ALTER ROLE ringmesh PASSWORD '{POSTGRES}'")
            (data / "pg_hba.conf").write_text("local all all scram-sha-256\n")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.close()

        asyncio.run(protect())

    def stop(self):
        """Then all is in its files."""
        self._ledger.stop()


@pytest.fixture
def folder():
    # Short, for the sockets in it.
    with tempfile.TemporaryDirectory(prefix="ringmesh-") as name:
        yield Path(name)


@pytest.fixture
def database(folder):
    made = Database(folder / "database")
    yield made
    made.stop()


class Browser:
    """One that keeps cookies, and all that it was shown."""

    def __init__(self, console, ca):
        self.console, self.shown, self.cookies = console, [], CookieJar()
        trust = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
        self._opener = urllib.request.build_opener(trust, urllib.request.HTTPCookieProcessor(self.cookies))

    def open(self, url, data=None):
        request = urllib.request.Request(url, data, {"Origin": self.console, "Accept": "text/html"})
        try:
            answer = self._opener.open(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
        # Without the one header whose purpose it is.
        headers = [f"{name}: {value}" for name, value in answer.headers.items() if name.lower() != "set-cookie"]
        self.shown.append("\n".join([answer.url, *headers, text]))
        return text

    def post(self, path, **fields):
        return self.open(self.console + path, urlencode(fields).encode())


def call(channel, method, request, authorization):
    """What the caller is told."""
    metadata = (("authorization", f"Bearer {authorization}"), ("traceparent", f"00-{7:032x}-{7:016x}-01"))
    try:
        return str(channel.unary_unary(method)(request.SerializeToString(), metadata=metadata, timeout=60))
    except grpc.RpcError as error:
        return f"{error.code()} {error.details()} {error.trailing_metadata()}"


def test_secrets_are_in_nothing_that_a_full_run_shows_or_leaves(folder, redis, database, monkeypatch):
    state = folder / "state"
    state.mkdir()
    (state / "jwks.json").write_bytes(jwks("ec"))
    key = keys.create(state / "keys.jsonl", "one", "", ["infer", "read"], [], None)
    ours, forged = token(roles=["admin"]), token("other", roles=["admin"], headers={"kid": "ec"})
    for name, value in {
        "api_keys": state / "keys.jsonl", "jwt_keys": state / "jwks.json", "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE, "database_url": database.url, "log_level": "DEBUG", "trace_ratio": 1,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"RINGMESH_{name.upper()}", str(value))
    stack = start_stack(state, "--workers", "1", "--tls", "--redis", f"redis://:{REDIS}@127.0.0.1:{redis}")
    described = json.loads((state / "stack.json").read_text())
    ca = state / "tls" / "ca.pem"
    shown = []
    try:
        (edge,) = re.findall(r"✓ edge +(\S+)", stack.output)
        trust = grpc.ssl_channel_credentials(ca.read_bytes())
        with grpc.secure_channel(edge, trust) as channel:
            inference = "/inference.GRPCInferenceService"
            for sent in (key, ours, forged, "rmk_wrong", "a.b.c"):
                shown += [
                    call(channel, f"{inference}/ModelInfer", fresh(), sent),
                    call(channel, f"{inference}/ModelInfer", v2.ModelInferRequest(model_name="none"), sent),
                    call(channel, f"{inference}/RepositoryModelUnload", v2.RepositoryModelUnloadRequest(), sent),
                ]
        browser = Browser(described["console"], ca)
        browser.post("/sign-in", key="rmk_guessed")
        browser.post("/sign-in", key=forged)
        sessions = []
        for secret, who in ((key, "key one"), (ours, "token app")):
            assert who in browser.post("/sign-in", key=secret)
            sessions += [cookie.value for cookie in browser.cookies]
        eventually(lambda: "miss" in browser.post("/try", model="mlp"))  # once the console has found the router
        browser.post("/cache", scope="everything", confirmed="yes")
        for page in PAGES:
            browser.open(described["console"] + page)
        with grpc.insecure_channel(described["ledger"]) as channel:
            ledger = ledger_pb2_grpc.LedgerServiceStub(channel)
            report = ledger_pb2.ReportRequest(by=[ledger_pb2.GROUP_MODEL], from_ms=now_ms() - HOUR_MS)
            authorization = (("authorization", f"Bearer {key}"),)
            eventually(lambda: "mlp" in str(ledger.Report(report, metadata=authorization, timeout=60)))
        tell(redis, f"AUTH {REDIS}", "SHUTDOWN NOSAVE")

        def is_missed():
            browser.post("/try", model="mlp")
            return f"127.0.0.1:{redis} is skipped" in (state / "logs" / "router.log").read_text()

        eventually(is_missed)
        for address in described["metrics"].values():
            browser.open(f"http://{address}/metrics")
        browser.post("/sign-out")
        for command in ("top", "models"):
            done = subprocess.run([*RINGMESH, command, "--state", str(state)], capture_output=True, text=True)
            shown.append(done.stdout + done.stderr)
        for process in stack.tree():
            shown.append(f"{process.name()} {process.cmdline()}")
        shown += [*browser.shown, stack.output]
    finally:
        assert stop_stack(stack) == 0
    database.stop()
    tls_keys = [path for path in (state / "tls").iterdir() if path.name.endswith("-key.pem")]
    assert tls_keys
    meant = {state / "key-secret", *tls_keys}
    left = [path for path in folder.rglob("*") if path.is_file() and path not in meant]
    texts = {str(number): text for number, text in enumerate(shown)}
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in left}
    # It was a full run: what should be there is.
    everywhere = "".join(texts.values())
    for trace in ("RepositoryModelUnload", "mlp", "hit-local", "key one", "token app", "SCRAM-SHA-256"):
        assert trace in everywhere, trace
    assert any("mlp" in text for where, text in texts.items() if where.startswith(str(folder / "database")))
    secrets = {
        "API key": key, "unknown API key": "rmk_wrong", "guessed API key": "rmk_guessed",
        "session": sessions[0], "session of a token": sessions[1],
        "password of Redis": REDIS, "password of PostgreSQL": POSTGRES,
        "key secret": processes.KEY_SECRET, "credential": credential_of(processes.KEY_SECRET),
    }  # fmt: skip
    for name, jwt in (("token", ours), ("forged token", forged)):
        secrets |= {f"{name}, part {number}": part for number, part in enumerate(jwt.split(".")) if number}
    for path in tls_keys:
        lines = path.read_text().splitlines()[1:-1]
        secrets |= {f"{path.name}, line {number}": line for number, line in enumerate(lines) if len(line) > 20}
    found = {
        name: [where for where, text in texts.items() if secret in text]
        for name, secret in secrets.items()
        if secret in everywhere
    }
    assert found == {}
