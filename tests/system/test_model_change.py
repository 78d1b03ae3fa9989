"""Model files replaced under load: no answer of the old ones after the load call returned."""

import asyncio
import random

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.models import save, value
from tests.system.processes import free_address
from tests.system.test_cache import INFER

pytestmark = pytest.mark.proof
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
SWAPS = 40


def write(repository, turn):
    """FP32 x[n,1] -> y = x + turn, put in place at once."""
    node = helper.make_node("Add", ["x", "turn"], ["y"])
    x, y = value("x", TensorProto.FLOAT, "n", 1), value("y", TensorProto.FLOAT, "n", 1)
    turns = numpy_helper.from_array(np.array([turn], np.float32), "turn")
    folder = save(repository.parent / "next", "turning", [node], [x], [y], [turns])
    place = repository / "turning/1"
    place.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").replace(place / "model.onnx")
    assert onnx.load(place / "model.onnx").graph.initializer[0].name == "turn"


async def test_forty_swaps_under_load_and_not_one_wrong_answer(start_worker, start_router, tmp_path, valkey):
    repository = tmp_path / "models"
    write(repository, 0)
    workers = [start_worker(f"worker-{index}", models=repository, address=free_address()) for index in range(2)]
    routers = [start_router([worker.address for worker in workers], valkey.connection_url) for _ in range(2)]
    channels = [grpc.aio.insecure_channel(router.address) for router in routers]
    loaded = 0
    loading = 0
    stopping = False
    wrong, outcomes = [], {}

    async def call(number):
        rng = random.Random(number)
        while not stopping:
            x = float(rng.randrange(20))
            request = v2.ModelInferRequest(model_name="turning", raw_input_contents=[np.float32(x).tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=(1, 1))
            least = loaded
            infer = rng.choice(channels).unary_unary(INFER)(request.SerializeToString(), timeout=60)
            try:
                response = v2.ModelInferResponse.FromString(await infer)
            except grpc.aio.AioRpcError as error:
                wrong.append(f"{error.code()}: {error.details()}")
                continue
            turn = np.frombuffer(response.raw_output_contents[0], np.float32)[0] - x
            outcome = dict(await infer.trailing_metadata())["ringmesh-cache"]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if not least <= turn <= loading:
                wrong.append(
                    f"{outcome} of turn {turn}, asked after {least} was loaded, while {loading} was the newest"
                )

    callers = [asyncio.create_task(call(number)) for number in range(16)]
    for turn in range(1, SWAPS + 1):
        loading = turn
        await asyncio.to_thread(write, repository, turn)
        load = random.choice(channels).unary_unary(LOAD)
        await load(v2.RepositoryModelLoadRequest(model_name="turning").SerializeToString(), timeout=60)
        loaded = turn
    stopping = True
    await asyncio.gather(*callers)
    for channel in channels:
        await channel.close()
    assert wrong == []
    assert outcomes.keys() >= {"hit-local", "miss"}
