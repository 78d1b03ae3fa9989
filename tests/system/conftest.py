"""A running stack, brought up as people do it: by `ringmesh up`, as real processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import tritonclient.grpc as triton

from tests.models import build
from tests.ports import free_block
from tests.system import processes
from tests.valkeys import valkey_server

GRPCURL = str(Path(sys.executable).parent / "grpcurl")
RINGMESH = [sys.executable, "-P", "-m", "services.cli"]
UP_SECONDS = 180
MAX_MESSAGE_BYTES = 4 << 20


@dataclass
class RunningStack:
    """`stack.json` of a stack that is ready, and the supervisor that keeps it."""

    supervisor: subprocess.Popen
    state: str
    router: str
    cache: str
    ledger: str
    workers: list[str]
    redis_url: str
    trace_dir: Path
    max_message_bytes: int = MAX_MESSAGE_BYTES

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return output_file(Path(self.state)).read_text()

    @property
    def pids(self) -> dict[str, int]:
        """By name: router, cache, valkey, worker-0, ..."""
        return json.loads((Path(self.state) / "stack.json").read_text())["processes"]

    def tree(self) -> list[psutil.Process]:
        """The supervisor and all that it started."""
        supervisor = psutil.Process(self.supervisor.pid)
        return [supervisor, *supervisor.children(recursive=True)]


def output_file(state: Path) -> Path:
    return state / "output.txt"


def start_stack(
    state: Path, *arguments: str, cwd: Path | None = None, ringmesh: Sequence[str | Path] = RINGMESH, **settings: str
) -> RunningStack:
    """`ringmesh up` on ports of its own, with RINGMESH_* settings; returns when it is ready."""
    state.mkdir(parents=True, exist_ok=True)
    # As an earlier run would have left it; routers that tests add must have the same.
    (state / "key-secret").write_text(processes.KEY_SECRET)
    environment = {"RINGMESH_MAX_MESSAGE_BYTES": str(MAX_MESSAGE_BYTES), **os.environ}
    environment |= {f"RINGMESH_{name.upper()}": value for name, value in settings.items()}
    with output_file(state).open("w") as output:
        command = [*ringmesh, "up", "--base-port", str(free_block()), "--state", str(state), *arguments]
        supervisor = subprocess.Popen(command, stdout=output, stderr=output, cwd=cwd, env=environment)

    def is_ready():
        assert supervisor.poll() is None, output_file(state).read_text()
        # The ledger, which nobody waits for, may say so afterwards.
        return "\nready\n" in output_file(state).read_text()

    eventually(is_ready, UP_SECONDS)
    found = json.loads((state / "stack.json").read_text())
    return RunningStack(
        supervisor=supervisor,
        state=str(state),
        router=found["router"],
        cache=found["cache"],
        ledger=found["ledger"],
        workers=found["workers"],
        redis_url=found["redis_url"],
        trace_dir=Path(found["traces"]),
    )


def stop_stack(stack: RunningStack) -> int:
    """The exit code after a SIGTERM; nothing of it runs any more."""
    tree = stack.tree() if stack.supervisor.poll() is None else []
    stack.supervisor.terminate()
    try:
        return stack.supervisor.wait(UP_SECONDS)
    finally:
        for process in psutil.wait_procs(tree, timeout=0)[1]:
            process.kill()


def eventually(condition, seconds=60.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"not within {seconds} s"
        time.sleep(0.02)


def pytest_generate_tests(metafunc):
    """On the native engine; what an engine does in a way of its own also on grpcio, with the proofs."""
    if "engine" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("both_engines") is not None
        others = [pytest.param("grpcio", marks=pytest.mark.proof)] if both else []
        metafunc.parametrize("engine", ["native", *others], indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """The repository that stacks, workers and routers of these tests serve."""
    return build(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stack(engine, models, tmp_path_factory):
    """A router, two workers, a cache and Valkey on this engine; tests leave it as they found it."""
    state = tmp_path_factory.mktemp(f"stack-{engine}")
    running = start_stack(state, "--models", str(models), "--drain", "5", engine=engine, **processes.STEADY)
    yield running
    assert stop_stack(running) == 0


@pytest.fixture
async def channel(stack):
    """To the router."""
    async with grpc.aio.insecure_channel(stack.router) as channel:
        yield channel


@pytest.fixture(params=["router", "worker"])
def address(request, stack) -> str:
    """Of what speaks the v2 protocol."""
    return stack.router if request.param == "router" else stack.workers[0]


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def console(stack) -> str:
    """The URL of its pages."""
    return json.loads((Path(stack.state) / "stack.json").read_text())["console"]


@pytest.fixture
def valkey():
    """One of the test's own."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def start_worker(engine, models):
    """Starts a worker of its own: start_worker("name", **settings)."""
    started = []

    def start(worker_id, **settings):
        defaults = {"worker_id": worker_id, "engine": engine, "models": models, "threads": 1}
        process = processes.start("services.inference", **(defaults | settings))
        started.append(process)
        return process

    yield start
    processes.kill(*started)


@pytest.fixture
def start_router(engine):
    """Starts a router of its own: start_router(worker_addresses, redis_url, **settings)."""
    started = []

    def start(workers, redis_url, **settings):
        started.append(
            processes.start("router", workers=",".join(workers) or None, redis_url=redis_url, engine=engine, **settings)
        )
        return started[-1]

    yield start
    # One that is killed keeps its seat: purges of the tests that follow would wait for it.
    processes.stop(*started)
