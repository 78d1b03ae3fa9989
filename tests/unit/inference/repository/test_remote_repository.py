import asyncio
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.inference.models.model_store import READY, ModelStore
from services.inference.repository.config import parse
from services.inference.repository.remote_repository import RemoteRepository
from services.inference.repository.repository import RepositoryError, versions
from services.runtime.errors import UnavailableError
from tests import models
from tests.system.processes import free_address
from tests.unit.inference.loaded import EXECUTOR, open_model
from tests.unit.inference.models.test_model_store import answer, states

RCLONE = Path(sys.executable).parent / "rclone"


def serve_bucket(folder, *options):
    """A real server of S3 (and of GCS's XML form of it); its buckets are the folders in `folder`."""
    address = free_address()
    command = [RCLONE, "serve", "s3", folder, "--addr", address, "--dir-cache-time", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while b"Starting" not in (line := process.stderr.readline()):
        assert line, "rclone did not start"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process, f"http://{address}"


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    """(folder of buckets, S3 endpoint, GCS endpoint)"""
    folder = tmp_path_factory.mktemp("buckets")
    s3, s3_url = serve_bucket(folder, "--auth-key", "key,secret")
    gs, gs_url = serve_bucket(folder)
    yield folder, s3_url, gs_url
    for process in (s3, gs):
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with a test CA (ca.pem) and a certificate of 127.0.0.1 that it signed (server.pem)."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        f"req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=test -addext basicConstraints=critical,CA:TRUE",
        f"req {key} -keyout server.key -out server.csr -subj /CN=test",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -out server.pem -extfile names",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


class Handler(SimpleHTTPRequestHandler):
    """A folder; `server.fault` spoils the answers to paths that hold `server.spoiled`."""

    def do_GET(self):
        self.server.asked.append(self.path)
        fault = self.server.fault if self.server.spoiled in self.path else ""
        if fault in ("403", "404"):
            self.send_error(int(fault))
        elif fault:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "damaged":
                self.wfile.write(bytes(len(data)))
            else:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "stalled":
                    self.server.stalled.set()
                    self.server.goes_on.wait(120)
                self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, certificates, monkeypatch):
    """A TLS server of the folder `web`, trusted by this process."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "web"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.folder, server.url = tmp_path / "web", f"https://127.0.0.1:{server.server_port}"
    server.asked, server.fault, server.spoiled = [], "", ".onnx"
    server.stalled, server.goes_on = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()


def index(folder):
    """What `sha256sum` writes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(folder)}" for path in files]
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))


class Remote:
    """Models under `url`: those of `folder`, once published."""

    def __init__(self, url, folder, web=None):
        self.url, self.folder, self.web = url, folder, web

    def publish(self):
        if self.web is not None:
            index(self.folder)


def bucket_environment(monkeypatch, s3_url, gs_url):
    for name, value in {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({"gcs_base_url": gs_url, "disable_oauth": True})[:-1]
        + ', "client_email": "", "private_key": "", "private_key_id": ""}',
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["s3", "gs", "https"])
def remote(request, monkeypatch):
    if request.param == "https":
        web = request.getfixturevalue("web")
        yield Remote(web.url, web.folder, web)
        return
    folder, s3_url, gs_url = request.getfixturevalue("buckets")
    bucket_environment(monkeypatch, s3_url, gs_url)
    (folder / "bucket/models").mkdir(parents=True)
    yield Remote(f"{request.param}://bucket/models", folder / "bucket/models")
    shutil.rmtree(folder / "bucket")


async def store(url, cache):
    made = ModelStore(await asyncio.to_thread(RemoteRepository, url, cache), open_model, EXECUTOR)
    await made.load_all()
    return made


async def test_models_are_served_and_followed_wherever_they_are(remote, tmp_path):
    models.mlp(remote.folder, seed=0)
    models.add_sub(remote.folder)
    remote.publish()
    made = await store(remote.url, tmp_path / "cache")
    assert await states(made) == [("add_sub", "1", READY), ("mlp", "1", READY)]
    before = await answer(made)
    models.mlp(remote.folder, seed=1)
    remote.publish()
    await made.load("mlp")
    loaded = await answer(made)
    assert loaded != before
    polling = asyncio.create_task(made.poll(0.02))
    models.mlp(remote.folder, seed=2)
    shutil.rmtree(remote.folder / "add_sub")
    remote.publish()
    async with asyncio.timeout(60):
        while await answer(made) == loaded or made.held.of("add_sub"):
            await asyncio.sleep(0.01)
    assert not polling.done()
    polling.cancel()


async def test_what_did_not_change_is_not_fetched_again_across_restarts(web, tmp_path):
    folder = models.mlp(web.folder)
    (folder.parent / "config.pbtxt").write_text("max_batch_size: 4")
    index(web.folder)
    await store(web.url, tmp_path / "cache")
    files = ["/mlp/1/model.onnx", "/mlp/config.pbtxt"]
    assert sorted(path for path in web.asked if path != "/SHA256SUMS") == files
    web.asked.clear()
    made = await store(web.url, tmp_path / "cache")
    assert set(web.asked) == {"/SHA256SUMS"}
    (folder.parent / "config.pbtxt").write_text("max_batch_size: 5")
    index(web.folder)
    await made.load("mlp")
    assert made.held.find("mlp", "").model.max_batch_rows == 5
    assert set(web.asked) == {"/SHA256SUMS", "/mlp/config.pbtxt"}


def test_workers_of_one_host_share_what_they_fetch(web, tmp_path):
    models.mlp(web.folder)
    index(web.folder)

    def fetch(_):
        return RemoteRepository(web.url, tmp_path / "cache").fetch("mlp", None)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, range(4)))
    assert len(folders) == 1
    assert web.asked.count("/mlp/1/model.onnx") == 1


def test_an_unchanged_object_of_a_bucket_is_not_fetched_again(remote, tmp_path):
    models.mlp(remote.folder)
    remote.publish()
    RemoteRepository(remote.url, tmp_path).fetch("mlp", None)
    (fetched,) = (tmp_path / "objects").iterdir()
    before = fetched.stat().st_ino
    config = remote.folder / "mlp/config.pbtxt"
    config.write_text("max_batch_size: 4")
    remote.publish()
    found = RemoteRepository(remote.url, tmp_path).fetch("mlp", None)
    assert (found / "mlp/config.pbtxt").read_text() == "max_batch_size: 4"
    assert fetched.stat().st_ino == (found / "mlp/1/model.onnx").stat().st_ino == before


def test_only_versions_that_are_served_are_fetched(remote, tmp_path):
    for version in (1, 2, 3):
        models.mlp(remote.folder, version=version)
    remote.publish()
    repository = RemoteRepository(remote.url, tmp_path)
    assert [f.version for f in versions(repository.fetch("mlp", None), "mlp")] == [3]
    assert len(list((tmp_path / "objects").iterdir())) == 1
    everything = parse("version_policy { all {} }", "test", "mlp")
    assert [f.version for f in versions(repository.fetch("mlp", everything), "mlp", everything)] == [1, 2, 3]


@pytest.mark.parametrize("fault", ["403", "404", "truncated", "damaged"])
async def test_a_fetch_that_fails_leaves_the_old_model_serving_and_nothing_half(web, tmp_path, fault):
    models.mlp(web.folder, seed=0)
    index(web.folder)
    made = await store(web.url, tmp_path / "cache")
    before = await answer(made)
    models.mlp(web.folder, seed=1)
    index(web.folder)
    web.fault = fault
    with pytest.raises(UnavailableError, match=r"mlp/1/model\.onnx") as caught:
        await made.load("mlp")
    assert "\n" not in caught.value.message
    assert await answer(made) == before
    assert len(list((tmp_path / "cache/objects").iterdir())) == 1
    assert list((tmp_path / "cache/partial").iterdir()) == []
    web.fault = ""
    await made.load("mlp")
    assert await answer(made) != before


def test_a_worker_killed_while_it_fetches_leaves_nothing_that_is_served(web, tmp_path):
    models.mlp(web.folder)
    index(web.folder)
    web.fault = "stalled"
    code = "import sys, pathlib; from services.inference.repository.remote_repository import RemoteRepository as R; "
    code += "R(sys.argv[1], pathlib.Path(sys.argv[2])).fetch('mlp', None)"
    worker = subprocess.Popen([sys.executable, "-c", code, web.url, str(tmp_path / "cache")])
    assert web.stalled.wait(120)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert list((tmp_path / "cache/objects").iterdir()) == []
    web.fault = ""
    found = RemoteRepository(web.url, tmp_path / "cache").fetch("mlp", None)
    assert (found / "mlp/1/model.onnx").read_bytes() == (web.folder / "mlp/1/model.onnx").read_bytes()


def test_what_was_not_used_for_a_week_leaves_the_cache(web, tmp_path):
    for name in ("mlp", "add_sub"):
        getattr(models, name)(web.folder)
    index(web.folder)
    repository = RemoteRepository(web.url, tmp_path)
    kept, gone = repository.fetch("mlp", None), repository.fetch("add_sub", None)
    week_ago = time.time() - 8 * 24 * 3600
    for path in (gone, *(tmp_path / "objects").iterdir()):
        os.utime(path, (week_ago, week_ago))
    RemoteRepository(web.url, tmp_path)
    assert (kept.exists(), gone.exists()) == (True, False)
    assert len(list((tmp_path / "objects").iterdir())) == 1


async def test_polling_tries_again_what_could_not_be_fetched(web, tmp_path):
    models.mlp(web.folder, seed=0)
    index(web.folder)
    made = await store(web.url, tmp_path / "cache")
    before = await answer(made)
    web.fault = "truncated"
    polling = asyncio.create_task(made.poll(0.02))
    models.mlp(web.folder, seed=1)
    index(web.folder)
    async with asyncio.timeout(60):
        while not any("model.onnx" in line.reason for line in await made.index()):
            await asyncio.sleep(0.01)
        web.fault = ""
        while await answer(made) == before:
            await asyncio.sleep(0.01)
    assert not polling.done()
    polling.cancel()


def refusal(url, cache):
    with pytest.raises(RepositoryError) as caught:
        RemoteRepository(url, cache).names()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bucket_that_cannot_be_read_is_told_in_one_line_with_its_cause(buckets, tmp_path, monkeypatch):
    folder, s3_url, gs_url = buckets
    (folder / "empty").mkdir(exist_ok=True)
    for environment, url, words in (
        ({}, "s3://nowhere/models", ("s3://nowhere/models", "404", "NoSuchBucket")),
        ({}, "gs://nowhere", ("gs://nowhere", "404", "NoSuchBucket")),
        ({}, "s3://empty", ("s3://empty", "<model>/<version>/model.onnx")),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://empty", ("s3://empty", "403", "SignatureDoesNotMatch")),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "s3://empty", ("s3://empty", "Connection refused")),
    ):
        bucket_environment(monkeypatch, s3_url, gs_url)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        line = refusal(url, tmp_path)
        assert all(word in line for word in words), line


def test_a_web_server_that_cannot_be_read_is_told_in_one_line_with_its_cause(web, tmp_path, monkeypatch):
    web.spoiled = "SHA256SUMS"
    for sums, fault, words in (
        (None, "", ("SHA256SUMS", "404")),
        ("", "403", ("SHA256SUMS", "403")),
        ("nonsense\n", "", ("SHA256SUMS, line 1", "sha256sum")),
        (f"{'0' * 64}  ../../x\n", "", ("'../../x'",)),
        (f"{'0' * 64}  /etc/passwd\n", "", ("'/etc/passwd'",)),
        ("", "", ("<model>/<version>/model.onnx",)),
    ):
        web.fault = fault
        if sums is not None:
            (web.folder / "SHA256SUMS").write_text(sums)
        line = refusal(web.url, tmp_path)
        assert all(word in line for word in (web.url, *words)), line
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate: UnknownIssuer" in refusal(web.url, tmp_path)


def test_a_full_disk_is_told_and_leaves_nothing_half(web, tmp_path):
    models.mlp(web.folder)
    index(web.folder)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(RepositoryError, match="No space left on device"):
            RemoteRepository(web.url, disk).fetch("mlp", None)
        assert list((disk / "objects").iterdir()) == []
        assert list((disk / "partial").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(RepositoryError, match=r"ringmesh-server\[remote\]"):
        RemoteRepository("s3://bucket", tmp_path)
