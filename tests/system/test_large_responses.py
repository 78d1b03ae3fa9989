"""Responses of hundreds of megabytes: others are answered meanwhile, and their memory is given back."""

import asyncio

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.machine.memory import KEPT_BYTES
from tests import models
from tests.system.callers import Callers, eventually
from tests.system.processes import free_address
from tests.system.test_cache import INFER
from tests.system.test_metrics import scrape, value

MEGABYTES = 300
LAG = "ringmesh_event_loop_lag_seconds"


@pytest.fixture
def wide_models(tmp_path):
    """mlp, and wide: FP32 x[n] -> y[n, 1 MiB]."""
    models.mlp(tmp_path)
    nodes = [helper.make_node("Unsqueeze", ["x", "one"], ["u"]), helper.make_node("Expand", ["u", "sizes"], ["y"])]
    constants = {"one": np.array([1]), "sizes": np.array([1, 1 << 18])}
    x, y = models.value("x", TensorProto.FLOAT, "n"), models.value("y", TensorProto.FLOAT, "n", 1 << 18)
    models.save(tmp_path, "wide", nodes, [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return tmp_path


async def wide(channel, number, megabytes):
    """Asks for so many, and checks what comes."""
    x = np.full(megabytes, number, np.float32)
    request = v2.ModelInferRequest(model_name="wide", id=str(number), raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    answer = await channel.unary_unary(INFER)(request.SerializeToString(), timeout=120)
    response = await asyncio.to_thread(v2.ModelInferResponse.FromString, answer)
    assert response.id == str(number)
    y = np.frombuffer(response.raw_output_contents[0], np.float32)
    assert y.size == megabytes << 18
    assert (y == number).all()


def above(metrics, seconds):
    """How often the event loop was late by more than that."""
    found = scrape(metrics)
    below = [
        (float(bound), count)
        for (name, labels), count in found.items()
        if name == f"{LAG}_bucket" and (bound := dict(labels)["le"]) != "+Inf"
    ]
    return value(found, f"{LAG}_count") - max(count for bound, count in below if bound <= seconds)


@pytest.mark.proof
@pytest.mark.alone
@pytest.mark.parametrize("way", ["socket", "tcp"])
async def test_large_responses_hold_up_no_event_loop_and_their_memory_is_given_back(
    wide_models, start_worker, start_router, tmp_path_factory, way
):
    metrics = {"worker": free_address(), "router": free_address()}
    sockets = str(tmp_path_factory.mktemp("s")) if way == "socket" else ""
    worker = start_worker(
        "worker-a", models=wide_models, metrics_address=metrics["worker"], socket_dir=sockets, max_batch_rows=1
    )
    router = start_router([worker.address], None, metrics_address=metrics["router"])
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(router.address, options=options) as channel:
        await wide(channel, 0, 1)
        before = [process.info.memory_info().rss for process in (worker, router)]
        async with Callers([grpc.aio.insecure_channel(router.address) for _ in range(2)]) as others:
            for number in range(1, 4):
                await wide(channel, number, number * MEGABYTES // 2)
            await others.more()
    assert others.errors == []
    # A hundredth of what it took before; far above what other processes of this machine do to it.
    assert {name: above(address, 0.5) for name, address in metrics.items()} == {"worker": 0, "router": 0}

    async def is_given_back():
        after = [process.info.memory_info().rss for process in (worker, router)]
        return all(now - then < KEPT_BYTES + (64 << 20) for now, then in zip(after, before, strict=True))

    await eventually(is_given_back)
