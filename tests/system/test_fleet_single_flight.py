"""One computation for the whole fleet, by ring ownership alone: three routers, three workers, no Redis."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.system.test_cache import INFER, computed, fresh

pytestmark = [pytest.mark.proof, pytest.mark.alone]


@pytest.fixture
async def channels(start_router, start_worker):
    with ThreadPoolExecutor() as pool:
        workers = [worker.address for worker in pool.map(start_worker, ("worker-a", "worker-b", "worker-c"))]
        routers = list(pool.map(lambda _: start_router(workers, None, audit_share=0), range(3)))
    async with contextlib.AsyncExitStack() as opened:
        yield [await opened.enter_async_context(grpc.aio.insecure_channel(router.address)) for router in routers]


async def test_a_thousand_equal_requests_on_all_routers_are_computed_once(channels):
    request = fresh("slow").SerializeToString()
    before = await computed(channels[0], "slow")
    infers = [channel.unary_unary(INFER) for channel in channels]
    answers = await asyncio.gather(*(infers[index % 3](request, timeout=120) for index in range(1000)))
    assert len(set(answers)) == 1
    assert await computed(channels[0], "slow") - before == 1


async def test_under_a_zipf_load_there_are_as_many_computations_as_distinct_requests(channels):
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 10_001)
    drawn = rng.choice(10_000, size=10_000, p=weights / weights.sum())
    inputs = rng.random((10_000, 64), dtype=np.float32)
    before = await computed(channels[0], "mlp")
    infer = channels[0].unary_unary(INFER)

    async def call(keys):
        for key in keys:
            request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[inputs[key].tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=(1, 64))
            await infer(request.SerializeToString(), timeout=120)

    await asyncio.gather(*(call(drawn[caller::32]) for caller in range(32)))
    assert await computed(channels[0], "mlp") - before == len(set(drawn.tolist()))
