"""Everything that can happen to a worker or a router, under steady load on three workers: no request fails."""

import asyncio
import shutil
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from tests.system import processes
from tests.system.steady_load import steady_load
from tests.system.test_faults import eventually

pytestmark = pytest.mark.proof

NAMES = ("worker-a", "worker-b", "worker-c")


@pytest.fixture(scope="session", params=["native"])
def engine(request):
    return request.param


@pytest.fixture
def workers(start_worker):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(start_worker, NAMES))


@pytest.fixture
def router(start_router, workers):
    return start_router([worker.address for worker in workers], None).address


async def all_serve(router, count=3):
    """Returns when the router asks so many workers."""
    async with grpc.aio.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)

        async def serve():
            return sum(worker.healthy for worker in (await stub.GetRing(router_pb2.GetRingRequest())).workers) == count

        await eventually(serve)


async def through(router, title, fault, heal=None, *, seconds=3.0):
    """Load before, during and after the fault."""
    await all_serve(router)
    async with steady_load(router) as load:
        await load.phase("before", 1.5)
        await load.phase("during", 0)
        await fault()
        await load.phase("during", seconds)
        if heal is not None:
            await heal()
        await load.phase("after", 1.5)
    load.report(title)
    assert load.errors == []
    return load


def signals(worker, number):
    async def send():
        worker.process.send_signal(number)

    return send


async def test_a_worker_that_is_killed(router, workers):
    load = await through(router, "kill -9", signals(workers[0], signal.SIGKILL))
    assert "worker-a" not in load.workers[-50:]


async def test_a_worker_that_is_stopped_and_goes_on(router, workers):
    await through(
        router, "SIGSTOP", signals(workers[0], signal.SIGSTOP), signals(workers[0], signal.SIGCONT), seconds=5.0
    )


async def test_a_rolling_restart_of_all_workers(router, workers, start_worker):
    async def restart():
        for name, worker in zip(NAMES, workers, strict=True):
            worker.process.terminate()
            assert await asyncio.to_thread(worker.process.wait, 20) == 0
            await asyncio.to_thread(start_worker, name, address=worker.address)
            await all_serve(router)

    load = await through(router, "rolling restart of 3 workers", restart, seconds=0.5)
    assert set(load.workers[-100:]) == set(NAMES)


@pytest.fixture
def away(start_worker, models, engine):
    """A worker in a network namespace of its own, and commands that run there."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    name = f"rm{uuid.uuid4().hex[:6]}"
    net = f"10.211.{uuid.uuid4().int % 200}"
    inside = ("ip", "netns", "exec", name)
    started = None
    if subprocess.run(("ip", "netns", "add", name), capture_output=True).returncode:
        pytest.skip("may not make network namespaces")
    try:
        for command in (
            f"ip link add {name}h type veth peer name {name}n netns {name}",
            f"ip addr add {net}.1/24 dev {name}h",
            f"ip link set {name}h up",
            f"ip netns exec {name} ip addr add {net}.2/24 dev {name}n",
            f"ip netns exec {name} ip link set {name}n up",
            f"ip netns exec {name} ip link set lo up",
        ):
            subprocess.run(command.split(), check=True, capture_output=True)
        started = processes.start(
            "services.inference", within=inside, address=f"{net}.2:8100", worker_id="worker-away", models=models,
            engine=engine, threads=1,
        )  # fmt: skip

        async def run(command):
            await asyncio.to_thread(
                subprocess.run, (*inside, *command.format(dev=f"{name}n").split()), check=True, capture_output=True
            )

        yield started.address, run
    finally:
        if started is not None:
            processes.stop(started)
        subprocess.run(("ip", "netns", "del", name), capture_output=True)


@pytest.fixture
def far_router(start_router, workers, away):
    return start_router([workers[0].address, workers[1].address, away[0]], None).address


async def test_a_worker_whose_network_is_cut(far_router, away):
    _, run = away
    load = await through(
        far_router,
        "network cut",
        lambda: run("ip link set {dev} down"),
        lambda: run("ip link set {dev} up"),
        seconds=5.0,
    )
    assert "worker-away" in load.workers
