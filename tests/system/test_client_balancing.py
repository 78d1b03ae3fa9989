"""Callers' channels follow the load that routers tell in their answers, where they ask for it."""

import asyncio
import re
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import ringmesh
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.console.data.scraper import fetch
from tests.system.processes import free_address
from tests.system.test_cache import INFER, fresh

pytestmark = pytest.mark.proof

TENANT = "balanced"


@pytest.fixture
def routers(start_router, stack):
    """Two, each with the address of its metrics."""
    made = []
    for _ in range(2):
        metrics = free_address()
        made.append((start_router(stack.workers, None, metrics_address=metrics).address, metrics))
    return made


async def answered(metrics):
    """How many calls of our tenant the router answered."""
    text = await asyncio.to_thread(fetch, metrics)
    lines = re.findall(r"^ringmesh_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    return sum(int(float(value)) for labels, value in lines if f'tenant="{TENANT}"' in labels)


async def share_of_second(routers, channel, calls):
    """Of so many calls through the channel."""
    before = [await answered(metrics) for _, metrics in routers]
    request = fresh().SerializeToString()
    for _ in range(calls):
        await channel.unary_unary(INFER)(request, timeout=60, metadata=[("ringmesh-tenant", TENANT)])
    first, second = [await answered(metrics) - count for (_, metrics), count in zip(routers, before, strict=True)]
    assert first + second == calls
    return second / calls


@asynccontextmanager
async def costly_calls(address):
    """Other callers' requests, so large that one costs as much as many of ours."""
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[np.ones((8000, 64), np.float32).tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=(8000, 64))
    body = request.SerializeToString()
    options = [("grpc.max_receive_message_length", -1)]

    async def call(channel):
        while True:
            await channel.unary_unary(INFER)(body, timeout=60)

    async with grpc.aio.insecure_channel(address, options=options) as channel:
        await channel.unary_unary(INFER)(body, timeout=60)
        tasks = [asyncio.create_task(call(channel)) for _ in range(4)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_a_weighted_channel_sends_less_to_a_router_whose_calls_cost_more(routers):
    target = "ipv4:" + ",".join(address for address, _ in routers)
    async with (
        grpc.aio.insecure_channel(target, options=ringmesh.channel_options()) as in_turn,
        grpc.aio.insecure_channel(target, options=ringmesh.channel_options(weighted=True)) as weighted,
        costly_calls(routers[0][0]),
    ):
        async with asyncio.timeout(120):
            while await share_of_second(routers, weighted, 100) < 0.75:
                pass
        assert await share_of_second(routers, weighted, 200) > 0.6
        assert await share_of_second(routers, in_turn, 200) == pytest.approx(0.5, abs=0.05)
