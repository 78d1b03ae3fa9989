"""More models than fit into the memory of the workers, through a router."""

import asyncio
import random

import grpc
import psutil
import pytest
import tritonclient.grpc as triton
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from tests import models as onnx_models
from tests.system.conftest import eventually
from tests.system.test_cache import infer

MEGABYTES = 24


def request(number, cached=True):
    message = v2.ModelInferRequest(model_name=f"table{number}")
    message.inputs.add(name="x", datatype="INT64", shape=[1])
    place = 0 if cached else random.randrange(1, MEGABYTES << 18)
    message.raw_input_contents.append(place.to_bytes(8, "little"))
    return message


def explain(router, message):
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return stub.Explain(router_pb2.ExplainRequest(request=message))


def chosen(router, number):
    candidates = explain(router, request(number, cached=False)).candidates
    return next(candidate.worker_id for candidate in candidates if candidate.chosen)


def in_memory(address, count):
    with triton.InferenceServerClient(address) as client:
        lines = client.get_model_repository_index().models
    assert {line.state for line in lines} == {"READY"}
    assert len(lines) == count
    return {line.name for line in lines if "not in memory" not in line.reason}


@pytest.mark.proof
def test_a_worker_that_has_the_model_in_memory_is_asked_before_one_that_would_load_it(
    start_worker, start_router, tmp_path
):
    for number in range(3):
        onnx_models.table(tmp_path, f"table{number}", number=number, megabytes=MEGABYTES)
    # Room for one each: what a model takes is between its file and about three times that.
    settings = {"models": tmp_path, "model_memory_bytes": MEGABYTES * 3 << 20}
    workers = {name: start_worker(name, **settings) for name in ("worker-a", "worker-b")}
    router = start_router([worker.address for worker in workers.values()], None).address
    for number, name in ((1, "worker-a"), (2, "worker-b")):
        with triton.InferenceServerClient(workers[name].address) as client:
            client.load_model(f"table{number}")
    holders = {name: in_memory(worker.address, 3) for name, worker in workers.items()}
    assert "table1" in holders["worker-a"]
    assert "table2" in holders["worker-b"]
    for number in (1, 2):
        alone = [name for name, held in holders.items() if f"table{number}" in held]
        # The router hears of it with the next poll; then whatever the key, it goes there.
        eventually(lambda n=number, a=alone: {chosen(router, n) for _ in range(16)} <= set(a))


@pytest.mark.proof
@pytest.mark.alone
async def test_more_models_than_fit_are_served_under_load_within_the_memory(start_worker, start_router, tmp_path):
    count = 8
    for number in range(count):
        onnx_models.table(tmp_path, f"table{number}", number=number, megabytes=MEGABYTES)
    limit = MEGABYTES * 4 << 20
    worker = start_worker("worker-a", models=tmp_path, model_memory_bytes=limit)
    router = start_router([worker.address], None).address
    process = psutil.Process(worker.process.pid)
    idle = process.memory_info().rss
    highest = 0

    async def caller(channel, seed):
        nonlocal highest
        order = random.Random(seed)
        for _ in range(12):
            response, _ = await infer(channel, request(order.randrange(count), cached=False))
            assert response.outputs[0].shape == [1]
            highest = max(highest, process.memory_info().rss)

    async with grpc.aio.insecure_channel(router) as channel:
        await asyncio.gather(*(caller(channel, seed) for seed in range(16)))
    assert 0 < len(in_memory(worker.address, count)) < count
    # While one is loaded its file is in memory too, parsed: about three times its size.
    assert highest < idle + limit + (MEGABYTES * 4 << 20)
