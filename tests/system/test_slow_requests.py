"""One request that takes long is one request that takes long: others are answered, and nobody is taken for dead."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.models import mlp, turned
from tests.system.callers import Callers
from tests.system.test_cache import INFER, infer

# Some seconds of work: longer than a router waits for a sign of life.
TURNS = 5_000_000


@pytest.fixture
def router(start_router, start_worker, tmp_path):
    turned(tmp_path)
    mlp(tmp_path)
    with ThreadPoolExecutor() as pool:
        workers = list(pool.map(lambda name: start_worker(name, models=tmp_path), ("worker-a", "worker-b")))
    return start_router([worker.address for worker in workers], None).address


def request(turns, x):
    array = np.array([x], np.float32)
    made = v2.ModelInferRequest(
        model_name="turned", raw_input_contents=[array.tobytes(), np.array(turns, np.int64).tobytes()]
    )
    made.inputs.add(name="x", datatype="FP32", shape=array.shape)
    made.inputs.add(name="turns", datatype="INT64", shape=[])
    return made


@pytest.mark.both_engines
async def test_a_request_whose_values_make_it_slow_holds_up_no_other(router):
    async with grpc.aio.insecure_channel(router) as channel:
        for x in range(40):
            await infer(channel, request(1, x))
        others = Callers([grpc.aio.insecure_channel(router) for _ in range(4)])
        async with others:
            slow = asyncio.ensure_future(channel.unary_unary(INFER)(request(TURNS, 0.0).SerializeToString()))
            await others.answered_by("worker-a", "worker-b")
            others.workers.clear()
            answer = await slow
    assert np.frombuffer(v2.ModelInferResponse.FromString(answer).raw_output_contents[0], np.float32) == [TURNS]
    assert others.errors == []
    # All the while, by the worker that was at work on it too.
    assert set(others.workers) == {"worker-a", "worker-b"}
