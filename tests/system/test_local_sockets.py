"""A worker on the router's host is reached over a Unix socket, and over TCP where that is not to be had."""

import asyncio
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc

from services.console.data.scraper import fetch
from tests.system.callers import eventually, sixteen
from tests.system.processes import Started, free_address
from tests.system.test_fleet_faults import away  # noqa: F401

METRICS = free_address()


async def described(worker):
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = inference_pb2_grpc.InferenceWorkerServiceStub(channel)
        return await stub.Describe(inference_pb2.DescribeRequest())


async def accepted(worker, path):
    """Connections to its socket."""
    return sum(connection.laddr == path for connection in worker.info.net_connections("unix")) - 1


def modes(path):
    """Of the socket and its folder; [] where they are gone."""
    return [oct(place.stat().st_mode & 0o777) for place in (Path(path), Path(path).parent) if place.exists()]


async def uses_the_socket(worker, path):
    """That envelopes then go there, tests/unit/router/transport/test_worker_client.py has."""
    return await accepted(worker, path) == 1


@pytest.fixture
def worker(start_worker, tmp_path):
    return start_worker("worker-a", socket_dir=tmp_path, metrics_address=METRICS)


@pytest.mark.both_engines
async def test_a_worker_on_the_same_host_is_reached_over_its_socket_which_goes_with_it(start_router, worker):
    router = start_router([worker.address], None)
    path = (await described(worker)).envelope_socket
    await eventually(partial(uses_the_socket, worker, path))
    assert modes(path) == ["0o600", "0o700"]
    async with sixteen(router.address) as callers:
        await callers.more()
    assert callers.errors == []
    await eventually(partial(uses_the_socket, worker, path))
    counted = r"^ringmesh_rpc_calls_total\{.*InferenceWorkerService/Execute.*\} [1-9]"
    assert re.search(counted, await asyncio.to_thread(fetch, METRICS), re.MULTILINE)
    worker.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.process.wait, 60) == 0
    assert modes(path) == []


@pytest.mark.proof
async def test_a_worker_restarted_under_load_is_found_at_its_new_socket_and_a_killed_ones_is_removed(
    start_router, start_worker, worker, tmp_path
):
    other = await asyncio.to_thread(start_worker, "worker-b", socket_dir=tmp_path)
    router = start_router([worker.address, other.address], None)
    old = (await described(worker)).envelope_socket
    await eventually(partial(uses_the_socket, worker, old))
    async with sixteen(router.address) as callers:
        await callers.more()
        worker.process.kill()
        worker.process.wait()
        assert modes(old)
        again = await asyncio.to_thread(start_worker, "worker-a", address=worker.address, socket_dir=tmp_path)
        assert modes(old) == []
        await eventually(partial(uses_the_socket, again, (await described(again)).envelope_socket))
    assert callers.errors == []


@pytest.mark.proof
async def test_a_worker_whose_socket_was_deleted_is_reached_over_tcp_by_those_who_come_then(
    start_router, start_worker, tmp_path
):
    worker = start_worker("worker-a", socket_dir=tmp_path)
    router = start_router([worker.address], None)
    path = (await described(worker)).envelope_socket
    async with sixteen(router.address) as callers:
        await eventually(partial(uses_the_socket, worker, path))
        await asyncio.to_thread(shutil.rmtree, tmp_path)
        await callers.more()
        assert await uses_the_socket(worker, path)
    late = await asyncio.to_thread(start_router, [worker.address], None)
    async with sixteen(late.address) as late_callers:
        await late_callers.more()
    assert callers.errors == late_callers.errors == []


@pytest.mark.proof
async def test_a_worker_in_another_network_namespace_is_reached_over_tcp_though_its_socket_is_in_reach(
    start_router,
    away,  # noqa: F811
):
    address, run = away
    worker = Started(address, None)
    router = await asyncio.to_thread(start_router, [worker.address], None)
    path = (await described(worker)).envelope_socket
    assert modes(path) == ["0o600", "0o700"]
    async with sixteen(router.address) as callers:
        await callers.more()
    assert callers.errors == []
    # By /proc/net/unix it listens there (01), and nobody is connected (03).
    await run(rf"grep -qP \s01\s+\d+\s{path}$ /proc/net/unix")
    with pytest.raises(subprocess.CalledProcessError):
        await run(rf"grep -qP \s03\s+\d+\s{path}$ /proc/net/unix")
