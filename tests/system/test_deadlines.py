"""Deadlines of callers that share one computation, on the router."""

import asyncio

import grpc
import numpy as np
import pytest
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests import models
from tests.system.callers import eventually
from tests.system.test_cache import INFER, fresh, infer

pytestmark = pytest.mark.both_engines


async def test_joined_callers_each_get_their_own_deadline(stack):
    request = fresh("slow").SerializeToString()
    async with grpc.aio.insecure_channel(stack.router) as channel:
        infer = channel.unary_unary(INFER)
        patient = [asyncio.ensure_future(infer(request, timeout=120)) for _ in range(2)]
        hasty = await asyncio.gather(*(infer(request, timeout=0.03) for _ in range(5)), return_exceptions=True)
        answers = await asyncio.gather(*patient)
    assert {error.code() for error in hasty} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert answers[0] == answers[1]


@pytest.mark.parametrize("way", ["socket", "tcp"])
async def test_a_queue_timeout_is_answered_though_a_request_that_came_with_it_still_waits(
    tmp_path, start_worker, start_router, way
):
    policy = "dynamic_batching { default_queue_policy { allow_timeout_override: true } }"
    models.slow(tmp_path, None, config=policy)
    worker = start_worker("one", models=tmp_path, **({"socket_dir": ""} if way == "tcp" else {}))
    router = start_router([worker.address], None)

    def request(trips, timeout_us=0):
        made = v2.ModelInferRequest(model_name="slow", raw_input_contents=[np.float32(trips).tobytes()])
        made.inputs.add(name="x", datatype="FP32", shape=[1, 1])
        if timeout_us:
            made.parameters["timeout"].int64_param = timeout_us
        return made

    async with (
        grpc.aio.insecure_channel(router.address) as channel,
        grpc.aio.insecure_channel(worker.address) as direct,
    ):
        describe = inference_pb2_grpc.InferenceWorkerServiceStub(direct).Describe
        running = asyncio.create_task(infer(channel, request(20_000)))

        async def is_running():
            return (await describe(inference_pb2.DescribeRequest())).load.requests

        await eventually(is_running)
        waits = asyncio.create_task(infer(channel, request(1)))
        with pytest.raises(grpc.aio.AioRpcError, match="longer than its queue timeout") as caught:
            await infer(channel, request(2, timeout_us=1000))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not running.done()
        assert not waits.done()
        for task in (running, waits):
            task.cancel()
