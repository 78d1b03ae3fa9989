"""`ringmesh up` as an operator meets it: real processes, started, broken and ended."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from tests import models
from tests.ports import free_block
from tests.system import processes
from tests.system.conftest import RINGMESH, UP_SECONDS, eventually, start_stack, stop_stack

# Many stacks, one after the other; the default run starts and stops one, in conftest.
pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """In a folder that was empty; tests leave it as they found it."""
    stack = start_stack(tmp_path_factory.mktemp("first"))
    yield stack
    assert stop_stack(stack) == 0


@pytest.fixture
def state(first, tmp_path):
    """A state folder as a second start finds it."""
    shutil.copytree(Path(first.state) / "models", tmp_path / "models")
    return tmp_path


@pytest.fixture
def running(state):
    stack = start_stack(state)
    yield stack
    if stack.supervisor.poll() is None:
        stop_stack(stack)


def shell(command, **options):
    return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=UP_SECONDS, **options)


def refused(*arguments):
    """The one line that `ringmesh up` ends with."""
    done = subprocess.run([*RINGMESH, "up", *arguments], capture_output=True, text=True, timeout=UP_SECONDS)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("ringmesh: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def assert_all_end(processes):
    _, alive = psutil.wait_procs(processes, timeout=UP_SECONDS)
    assert not alive


def test_the_printed_calls_work_as_printed(first):
    grpcurl, trace, tritonclient = re.search(
        r"\ngrpcurl\n(.+?)\n\nits trace\n(.+?)\n\ntritonclient\n(.+?)\n\nready\n", first.output, re.DOTALL
    ).groups()
    called = shell(grpcurl)
    assert called.returncode == 0, called.stderr
    assert '"model_name": "mlp"' in called.stdout.replace("modelName", "model_name")
    called = shell(tritonclient, executable="/bin/bash")
    assert called.returncode == 0, called.stderr
    assert len(re.findall(r"-?\d+\.\d+", called.stdout)) == 10
    eventually(lambda: re.search(r"Execute +worker", shell(trace).stdout))


def test_every_endpoint_is_in_the_table(first):
    for endpoint in (first.router, first.cache, first.ledger, *first.workers, first.redis_url.removeprefix("redis://")):
        assert endpoint in first.output


def test_the_services_have_the_installations_secret_and_nobody_else(first):
    told = {name: psutil.Process(pid).environ().get("RINGMESH_KEY_SECRET") for name, pid in first.pids.items()}
    services = {"router", "cache", "console", "ledger", "worker-0", "worker-1"}
    assert {name for name, secret in told.items() if secret == processes.KEY_SECRET} == services
    assert {name for name, secret in told.items() if secret is not None} == services


def test_a_signal_drains_and_leaves_nothing(running):
    def has_database():
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(process.name() == "postgres" for process in running.tree())

    # The ledger is not waited for, and starts its database last.
    eventually(has_database)
    tree = running.tree()
    assert {process.pid for process in tree} >= {running.supervisor.pid, *running.pids.values()}
    running.supervisor.send_signal(signal.SIGINT)
    assert running.supervisor.wait(UP_SECONDS) == 0
    assert_all_end(tree)
    assert running.output.endswith("stopped\n")
    assert not (Path(running.state) / "stack.json").exists()
    assert "error" not in "".join(log.read_text().lower() for log in Path(running.state).glob("logs/*.log"))


def test_a_signal_while_starting_leaves_nothing(state):
    command = [*RINGMESH, "up", "--base-port", "0", "--state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout.readline().startswith("starting")
        tree = [psutil.Process(supervisor.pid)]
        eventually(lambda: len(tree[0].children()) > 1)
        tree += tree[0].children(recursive=True)
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(UP_SECONDS) == 0
    assert_all_end(tree)


def test_a_second_signal_kills_what_does_not_drain(running):
    tree = running.tree()
    os.kill(running.pids["worker-1"], signal.SIGSTOP)
    running.supervisor.send_signal(signal.SIGINT)
    eventually(lambda: "draining" in running.output)
    running.supervisor.send_signal(signal.SIGINT)
    assert running.supervisor.wait(UP_SECONDS) == 130
    assert_all_end(tree)


def test_a_killed_supervisor_leaves_nothing_and_the_next_one_starts(running):
    tree = running.tree()
    running.supervisor.kill()
    running.supervisor.wait()
    assert_all_end(tree)
    assert stop_stack(start_stack(Path(running.state))) == 0


@pytest.mark.parametrize("name", ["worker-0", "router", "valkey"])
def test_a_process_that_dies_is_started_again(first, name):
    pid = first.pids[name]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: first.pids[name] not in (0, pid))
    assert f"{name} (pid {pid}) was ended by SIGKILL; starting it again in 1 s\n" in first.output
    assert f"{name} is back (pid {first.pids[name]})\n" in first.output
    with grpc.insecure_channel(first.router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)

        def all_are_healthy():
            ring = stub.GetRing(router_pb2.GetRingRequest(), timeout=60, wait_for_ready=True)
            return [worker.healthy for worker in ring.workers] == [True, True]

        eventually(all_are_healthy)


def test_several_routers_share_the_port_and_one_that_dies_comes_back(state):
    stack = start_stack(state, "--routers", "3")
    names = ["router-0", "router-1", "router-2"]
    assert [name for name in stack.pids if name.startswith("router")] == names
    assert "starting 3 routers and 2 workers" in stack.output
    port = int(stack.router.rpartition(":")[2])

    def listeners():
        """Which of them listen on the port, and none other."""
        found = [psutil.Process(stack.pids[name]).net_connections("tcp") for name in names if stack.pids[name]]
        return [any(c.status == "LISTEN" and c.laddr.port == port for c in connections) for connections in found]

    assert listeners() == [True, True, True]
    killed = stack.pids["router-1"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: f"router-1 is back (pid {stack.pids['router-1']})\n" in stack.output)
    assert stack.pids["router-1"] != killed
    assert listeners() == [True, True, True]
    assert stop_stack(stack) == 0


def test_a_taken_port_is_named_with_its_owner(state):
    base = free_block()
    port = base + 9  # the cache's
    with socket.create_server(("127.0.0.1", port)):
        line = refused("--state", str(state), "--base-port", str(base))
    name = psutil.Process().name()
    assert f"port {port} is in use by {name} (pid {os.getpid()}); choose another with --base-port" in line


def test_a_second_stack_in_one_state_folder_is_refused(first):
    line = refused("--state", first.state, "--base-port", "0")
    assert f"already runs in {first.state} (pid {first.supervisor.pid})" in line


def test_a_missing_model_repository_is_named(tmp_path):
    line = refused("--state", str(tmp_path), "--base-port", "0", "--models", str(tmp_path / "nowhere"))
    assert f"no model repository at {tmp_path / 'nowhere'}" in line


def test_an_empty_model_repository_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused("--state", str(tmp_path), "--base-port", "0", "--models", str(tmp_path / "empty"))
    assert f"no model in {tmp_path / 'empty'}" in line


def test_a_worker_that_cannot_start_says_why(state, monkeypatch):
    monkeypatch.setenv("RINGMESH_POLL_SECONDS", "often")
    line = refused("--state", str(state), "--base-port", "0", "--models", str(state / "models"))
    assert line.startswith("ringmesh: worker-0 cannot start: ")
    assert "RINGMESH_POLL_SECONDS" in line
    assert not [process for process in psutil.process_iter(["environ"]) if _is_of(process, state)]


def test_a_repository_of_which_nothing_loads_keeps_running_and_a_repaired_model_is_served(tmp_path):
    model = models.mlp(tmp_path / "models") / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(b"not a model")
    stack = start_stack(tmp_path, "--models", str(tmp_path / "models"), "--workers", "1", poll_seconds="0.1")
    assert re.search("^model mlp version 1 is not served: .*it is no ONNX model", stack.output, re.MULTILINE)
    assert "load a repaired model" not in stack.output  # polling does it
    model.write_bytes(whole)
    with grpc.insecure_channel(stack.router) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        eventually(lambda: stub.ModelReady(v2.ModelReadyRequest(name="mlp"), timeout=60).ready)
    assert stop_stack(stack) == 0


def test_failed_models_are_printed_and_plain_files_are_ignored(state):
    repository = state / "models"
    (repository / "a-broken-one" / "1").mkdir(parents=True)
    (repository / "a-broken-one" / "1" / "model.onnx").write_bytes(b"not a model")
    (repository / "README.md").touch()
    stack = start_stack(state, "--models", str(repository), "--workers", "1")
    assert re.search("^model a-broken-one .*is not served: .*it is no ONNX model", stack.output, re.MULTILINE)
    assert "load a repaired model on its page of the console" in stack.output
    assert "README.md" not in stack.output
    assert shell(re.search(r"\ngrpcurl\n(.+?)\n\nits trace", stack.output, re.DOTALL)[1]).returncode == 0
    assert stop_stack(stack) == 0


def test_an_unknown_variable_a_redis_that_is_not_reached_and_a_ledger_that_cannot_start_are_warnings(state):
    broken = {"trace_rato": "1", "database_url": "mysql://nowhere"}
    stack = start_stack(state, "--workers", "1", "--redis", "redis://127.0.0.1:1", **broken)
    assert "warning: the variable RINGMESH_TRACE_RATO is unknown and has no effect; did you mean" in stack.output
    assert "warning: the Redis of --redis does not answer" in stack.output
    assert "valkey" not in stack.pids
    assert "warning: ledger cannot start: RINGMESH_DATABASE_URL" in stack.output
    assert stop_stack(stack) == 0


def test_a_stack_on_all_interfaces_is_reached_at_each_address_and_says_what_is_open_without_keys(state):
    stack = start_stack(state, "--workers", "1", "--host", "0.0.0.0")
    port = stack.router.rpartition(":")[2]
    assert f"warning: 0.0.0.0:{port} is open to other hosts without API keys: anybody" in stack.output
    with grpc.insecure_channel(f"127.0.0.2:{port}") as channel:
        grpc.channel_ready_future(channel).result(60)
    listens = [
        c.laddr.ip for c in psutil.Process(stack.pids["worker-0"]).net_connections("tcp") if c.status == "LISTEN"
    ]
    assert sorted(listens) == ["0.0.0.0", "127.0.0.1"]  # /metrics, and gRPC for routers of this host
    assert stop_stack(stack) == 0


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_malformed_redis_url_is_refused(state, url):
    assert "is not a Redis URL" in refused("--state", str(state), "--base-port", "0", "--redis", url)


def test_what_it_writes_is_for_its_user_only(first):
    created = [path for path in Path(first.state).rglob("*") if path.parent.name in ("logs", "traces", "worker")]
    created += [Path(first.state) / name for name in ("logs", "traces", "worker", "stack.json", "supervisor.pid")]
    assert len(created) > 10
    assert [path for path in created if path.stat().st_mode & 0o077] == []


def test_a_folder_named_like_ours_does_not_disturb(state, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("project")
    for name in ("cache", "router"):
        (cwd / name).mkdir()
        (cwd / name / "__init__.py").write_text("raise RuntimeError('this is not the one')")
    ringmesh = Path(sys.executable).parent / "ringmesh"
    command = [ringmesh, "up", "--base-port", "0", "--workers", "1", "--state", state]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as supervisor:
        assert "ready\n" in supervisor.stdout
        supervisor.terminate()
        assert supervisor.wait(UP_SECONDS) == 0


def _is_of(process, state):
    return str(state) in ((process.info["environ"] or {}).get("RINGMESH_TRACE_DIR") or "")
