"""The ledger on Debian's PostgreSQL: over TLS, through PgBouncer in transaction mode, and with a replica."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.system import processes
from tests.system.conftest import eventually
from tests.system.ledgers import DUPLICATE, WRITTEN, Ledger, Sender, miss, unique

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(PROGRAMS is None or os.geteuid() != 0, reason="needs Debian's postgresql, as root"),
]


def as_postgres(*command, **options):
    environment = {**os.environ, "HOME": "/nonexistent"}
    return subprocess.Popen(command, user="postgres", group="postgres", extra_groups=[], env=environment, **options)


def run(*command, **options):
    assert as_postgres(*command, **options).wait() == 0, command


@pytest.fixture(scope="module")
def folder():
    # Not of pytest, whose folders only root may enter.
    with tempfile.TemporaryDirectory(prefix="ringmesh-database-", ignore_cleanup_errors=True) as name:
        shutil.chown(name, "postgres", "postgres")
        yield Path(name)


@pytest.fixture(scope="module")
def certificate(folder):
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject,
        "-keyout", folder / "key.pem", "-out", folder / "cert.pem", stderr=subprocess.DEVNULL)  # fmt: skip
    return folder / "cert.pem"


def start_server(data, port, *settings):
    options = [part for setting in settings for part in ("-c", setting)]
    server = as_postgres(PROGRAMS / "postgres", "-D", data, "-p", port, "-k", data, "-h", "localhost", *options)
    eventually(lambda: subprocess.run([PROGRAMS / "pg_isready", "-q", "-h", "localhost", "-p", port]).returncode == 0)
    return server


@pytest.fixture(scope="module")
def server(folder, certificate):
    """Its port; it takes connections over TLS with a password, and no others."""
    data, port = folder / "data", processes.free_address().split(":")[1]
    (folder / "password").write_text("secret")
    run(PROGRAMS / "initdb", "-D", data, "-U", "ledger", "-A", "scram-sha-256", "--pwfile", folder / "password",
        stdout=subprocess.DEVNULL)  # fmt: skip
    (data / "pg_hba.conf").write_text(
        "hostssl all all all scram-sha-256\nhostssl replication all all scram-sha-256\nlocal all all trust\n"
    )
    server = start_server(
        data, port, "ssl=on", f"ssl_cert_file={certificate}", f"ssl_key_file={folder / 'key.pem'}", "wal_level=replica"
    )
    yield port
    server.send_signal(signal.SIGINT)  # fast: sessions are ended
    server.wait()


def url(port, certificate):
    return f"postgresql://ledger:secret@localhost:{port}/postgres?sslmode=verify-full&sslrootcert={certificate}"


def assert_counts(ledger):
    sender, tenant = Sender(ledger), unique("tenant")
    records = [miss(tenant)]
    assert sender.append(records).result == WRITTEN
    assert sender.append(records, sequence=1).result == DUPLICATE
    eventually(lambda: ledger.report("tenant", tenant=tenant).total.requests == 1)


@pytest.fixture
def start_ledger():
    started = []

    def start(**settings):
        started.append(Ledger(**settings))
        return started[-1]

    yield start
    for ledger in started:
        ledger.stop()


def test_over_tls_with_a_password(start_ledger, server, certificate):
    assert_counts(start_ledger(database_url=url(server, certificate)))


def test_without_tls_the_server_refuses_and_the_ledger_says_so(server):
    refused = subprocess.run(
        [sys.executable, "-m", "services.ledger"],
        env={
            **os.environ,
            "RINGMESH_DATABASE_URL": f"postgresql://ledger:secret@localhost:{server}/postgres?sslmode=disable",
            "RINGMESH_ADDRESS": "127.0.0.1:0",
            "RINGMESH_METRICS_ADDRESS": "127.0.0.1:0",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 2
    assert "no encryption" in refused.stderr.splitlines()[-1]
    assert "secret" not in refused.stderr


@pytest.mark.skipif(shutil.which("pgbouncer", path="/usr/sbin:/usr/bin") is None, reason="needs Debian's pgbouncer")
def test_through_pgbouncer_in_transaction_mode(start_ledger, server, folder, certificate):
    port = processes.free_address().split(":")[1]
    settings = folder / "pgbouncer.ini"
    (folder / "users").write_text('"ledger" "secret"\n')
    settings.write_text(
        f"[databases]\npostgres = host=localhost port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nauth_type = plain\nauth_file = {folder / 'users'}\npool_mode = transaction\n"
        f"default_pool_size = 3\nserver_tls_sslmode = verify-full\nserver_tls_ca_file = {certificate}\n"
        f"unix_socket_dir =\n"
    )
    pooler = as_postgres("/usr/sbin/pgbouncer", "-q", settings)
    try:
        ledger = start_ledger(database_url=f"postgresql://ledger:secret@127.0.0.1:{port}/postgres?sslmode=disable")
        for _ in range(10):
            assert_counts(ledger)
    finally:
        pooler.kill()
        pooler.wait()


def test_reports_are_read_from_the_replica(start_ledger, server, folder, certificate):
    data, port = folder / "replica", processes.free_address().split(":")[1]
    run(PROGRAMS / "pg_basebackup", "-D", data, "-R", "-X", "stream", "-d",
        f"host=localhost port={server} user=ledger password=secret sslmode=require")  # fmt: skip
    replica = start_server(data, port, "ssl=on", f"ssl_cert_file={certificate}", f"ssl_key_file={folder / 'key.pem'}")
    ledger = start_ledger(database_url=url(server, certificate), replica_url=url(port, certificate))
    sender, tenant = Sender(ledger), unique("tenant")
    sender.append([miss(tenant)])
    eventually(lambda: ledger.report("tenant", tenant=tenant).total.requests == 1)
    # What the replica does not know yet, no report knows.
    subprocess.run(
        [PROGRAMS / "psql", "-qAt", "-h", data, "-p", port, "-U", "ledger", "postgres", "-c",
         "SELECT pg_wal_replay_pause()"], check=True,
    )  # fmt: skip
    sender.append([miss(tenant)])
    assert ledger.report("tenant", tenant=tenant).total.requests == 1
    subprocess.run(
        [PROGRAMS / "psql", "-qAt", "-h", data, "-p", port, "-U", "ledger", "postgres", "-c",
         "SELECT pg_wal_replay_resume()"], check=True,
    )  # fmt: skip
    eventually(lambda: ledger.report("tenant", tenant=tenant).total.requests == 2)
    replica.send_signal(signal.SIGINT)
    replica.wait()
