"""Everything that can happen to a worker or a router, under steady load on three workers: no request fails."""

import asyncio
import shutil
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
import ringmesh
import tritonclient.grpc.aio as triton
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from services.runtime.rpc.access import CREDENTIAL, credential_of
from tests.system import processes
from tests.system.callers import eventually
from tests.system.steady_load import steady_load
from tests.system.test_metrics import scrape, value
from tests.system.way import Way

pytestmark = pytest.mark.proof

NAMES = ("worker-a", "worker-b", "worker-c")


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


async def through(router, title, fault, heal=None, *, seconds=2.0, count=3):
    """Load before, during and after the fault."""
    await all_serve(router, count)
    async with steady_load(router) as load:
        await load.phase("before", 1.0)
        await load.phase("during", 0)
        await fault()
        await load.phase("during", seconds)
        if heal is not None:
            await heal()
        await load.phase("after", 1.0)
    load.report(title)
    assert load.errors == []
    return load


def signals(worker, number):
    async def send():
        worker.process.send_signal(number)

    return send


async def test_a_worker_that_is_killed(router, workers):
    load = await through(router, "kill -9", signals(workers[0], signal.SIGKILL))
    assert "worker-a" not in load.workers_of("after")


async def test_a_worker_that_is_stopped_and_goes_on(router, workers):
    await through(
        router, "SIGSTOP", signals(workers[0], signal.SIGSTOP), signals(workers[0], signal.SIGCONT), seconds=3.0
    )


async def test_a_rolling_restart_of_all_workers(router, workers, start_worker):
    async def restart():
        for name, worker in zip(NAMES, workers, strict=True):
            worker.process.terminate()
            assert await asyncio.to_thread(worker.process.wait, 60) == 0
            await asyncio.to_thread(start_worker, name, address=worker.address)
            await all_serve(router)

    load = await through(router, "rolling restart of 3 workers", restart, seconds=0.5)
    assert load.workers_of("after") == set(NAMES)


async def test_a_worker_that_is_added_and_one_that_is_removed(start_router, start_worker, valkey):
    url = valkey.connection_url
    start = [asyncio.to_thread(start_worker, name, discovery_url=url) for name in NAMES[:2]]
    leaves, _ = await asyncio.gather(*start)
    router = (await asyncio.to_thread(start_router, [], None, discovery_url=url)).address

    async def add():
        await asyncio.to_thread(start_worker, NAMES[2], discovery_url=url)
        await all_serve(router)

    load = await through(router, "worker added", add, count=2)
    assert load.workers_of("before") == set(NAMES[:2])
    assert load.workers_of("after") == set(NAMES)

    async def remove():
        leaves.process.terminate()
        assert await asyncio.to_thread(leaves.process.wait, 60) == 0
        await all_serve(router, 2)

    load = await through(router, "worker removed", remove)
    assert load.workers_of("before") == set(NAMES)
    assert load.workers_of("after") == set(NAMES[1:])


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
            processes.kill(started)
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
        seconds=3.0,
    )
    assert "worker-away" in load.workers


async def test_a_caller_on_another_host_may_infer_but_not_operate(away):
    async with grpc.aio.insecure_channel(away[0]) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        worker = inference_pb2_grpc.InferenceWorkerServiceStub(channel)
        assert (await stub.RepositoryIndex(v2.RepositoryIndexRequest())).models
        for refused in (
            stub.RepositoryModelUnload(v2.RepositoryModelUnloadRequest(model_name="mlp")),
            stub.LogSettings(v2.LogSettingsRequest()),
            worker.Execute(inference_pb2.ExecuteRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="RINGMESH_ADMIN_NETWORKS"):
                await refused
        credential = ((CREDENTIAL, credential_of(processes.KEY_SECRET)),)
        await worker.Execute(inference_pb2.ExecuteRequest(), metadata=credential)


async def test_a_worker_that_is_slowed_by_300_ms(start_router, workers):
    async with Way(workers[0].address) as way:
        addresses = [way.address, *(worker.address for worker in workers[1:])]
        router = await asyncio.to_thread(start_router, addresses, None)

        async def slow():
            way.seconds = 0.15

        async def heal():
            way.seconds = 0.0

        await through(router.address, "300 ms slower", slow, heal, seconds=3.0)


@pytest.fixture
def routers(start_router, stack):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda _: start_router(stack.workers, None), range(2)))


def both(routers):
    return "ipv4:" + ",".join(router.address for router in routers)


async def killed(routers, title, options):
    """The load that a router was killed under."""
    async with steady_load(both(routers), options=options) as load:
        await load.phase("before", 1.0)
        routers[0].process.kill()
        await load.phase("during", 1.0)
        await load.phase("after", 1.0)
    load.report(title)
    return load


async def test_a_router_that_is_killed_costs_no_call_with_our_channel_options(routers):
    load = await killed(routers, "router killed, our channel options", ringmesh.channel_options())
    assert load.errors == []


async def test_a_router_that_is_killed_costs_its_own_unanswered_calls_without_retries(routers):
    load = await killed(routers, "router killed, no retries", ringmesh.channel_options(retries=False))
    # Those under way, and those that were sent before the channel heard of it.
    assert load.failed("after") == 0


async def has_answered(metrics):
    return value(await asyncio.to_thread(scrape, metrics), "ringmesh_requests_total") > 0


async def test_a_rolling_restart_of_all_routers(routers, start_router, stack):
    async with steady_load(both(routers), options=ringmesh.channel_options()) as load:
        await load.phase("before", 1.0)
        for router in routers:
            await load.phase("during", 0)
            router.process.terminate()
            assert await asyncio.to_thread(router.process.wait, 60) == 0
            metrics = processes.free_address()
            await asyncio.to_thread(start_router, stack.workers, None, address=router.address, metrics_address=metrics)
            # As minReadySeconds of a Kubernetes deployment: callers find it before the next one goes.
            await eventually(partial(has_answered, metrics))
        await load.phase("after", 1.0)
    load.report("rolling restart of 2 routers")
    assert load.errors == []


async def test_tritonclient_with_our_channel_options_outlives_a_router(routers):
    client = triton.InferenceServerClient(both(routers), channel_args=ringmesh.channel_options())
    assert await client.is_server_ready()
    routers[0].process.kill()
    for _ in range(20):
        assert await client.is_model_ready("mlp")
    await client.close()
