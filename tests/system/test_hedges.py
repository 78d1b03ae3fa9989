"""A model that asks for hedges, on real workers: who is slow is not waited for, and does not run what was answered."""

import asyncio
import re
from functools import partial
from itertools import count

import grpc
import numpy as np
import pytest
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.console.data.scraper import fetch
from tests import models
from tests.system.callers import eventually
from tests.system.processes import free_address
from tests.system.test_cache import infer

pytestmark = pytest.mark.proof

CONFIG = 'parameters { key: "ringmesh_hedge" value { string_value: "true" } }'
_fraction = count(1)


@pytest.fixture(scope="module")
def hedged_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hedged")
    models.slow(folder, None, name="hedged", config=CONFIG)
    return folder


def request(turns):
    """A new one; it takes as many turns of a loop, each a part of a millisecond."""
    x = np.array([[turns + next(_fraction) * 1e-4]], np.float32)
    made = v2.ModelInferRequest(model_name="hedged", raw_input_contents=[x.tobytes()])
    made.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return made


async def counted(metrics, family, label):
    """The values of a metric by one of its labels."""
    text = await asyncio.to_thread(fetch, metrics)
    values = {}
    for labels, value in re.findall(rf"^{family}{{(.*)}} (\S+)$", text, re.MULTILINE):
        by = re.search(f'{label}="([^"]*)"', labels).group(1)
        values[by] = values.get(by, 0) + int(float(value))
    return values


async def test_a_hedge_answers_for_a_busy_worker_which_never_runs_what_it_had_in_its_queue(
    start_worker, start_router, hedged_models
):
    metrics = {name: free_address() for name in ("worker-a", "worker-b", "router")}
    addresses = [
        start_worker(name, models=hedged_models, metrics_address=metrics[name]).address
        for name in ("worker-a", "worker-b")
    ]
    router = start_router(addresses, None, metrics_address=metrics["router"], audit_share=0).address
    requests = "ringmesh_worker_requests_total"
    async with grpc.aio.insecure_channel(router) as channel, grpc.aio.insecure_channel(addresses[0]) as worker_a:
        describe = inference_pb2_grpc.InferenceWorkerServiceStub(worker_a).Describe

        async def has(count):
            """Whether so many requests are with worker-a, and none of them waits."""
            load = (await describe(inference_pb2.DescribeRequest())).load.requests
            depth = await counted(metrics["worker-a"], "ringmesh_worker_queue_depth", "model")
            return (load, depth) == (count, {"hedged": 0})

        for _ in range(100):  # enough to know what is slow
            await infer(channel, request(1))
        await eventually(partial(has, 0))  # of one that was hedged, both attempts have ended
        before = await counted(metrics["worker-a"], requests, "result")
        busy = asyncio.create_task(infer(worker_a, request(4000)))

        await eventually(partial(has, 1))
        answers = await asyncio.gather(*(infer(channel, request(1)) for _ in range(8)))
        assert not busy.done()
        assert {told["ringmesh-worker"] for _, told in answers} == {"worker-b"}
        hedges = (await counted(metrics["router"], "ringmesh_attempts_total", "kind"))["hedge"]
        assert hedges > 0

        async def withdrawn():
            return (await counted(metrics["worker-a"], requests, "result"))["withdrawn"] > 0

        await eventually(withdrawn)
        await busy
        after = await counted(metrics["worker-a"], requests, "result")
        assert after["withdrawn"] - before["withdrawn"] <= hedges
        assert after["ok"] - before["ok"] == 1
