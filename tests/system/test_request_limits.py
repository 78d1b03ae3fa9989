"""Small requests that once held a process up for seconds to minutes are refused before they are parsed, everywhere."""

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from services.runtime import wire
from tests.system.test_cache import fresh

NAME = wire.field(1, b"mlp")
REQUESTS = {
    "nearly a million empty inputs with their contents": NAME + b"\x2a\0\x3a\0" * 900_000,
    "nearly two million outputs": fresh().SerializeToString() + b"\x32\0" * 1_900_000,
    "nearly two million strings": NAME + wire.field(5, wire.field(5, b"\x42\0" * 1_900_000)),
    "many parameters": fresh().SerializeToString()
    + b"".join(wire.field(4, wire.field(1, b"%06d" % number)) for number in range(380_000)),
}


@pytest.fixture(params=REQUESTS.values(), ids=REQUESTS)
def data(request):
    return request.param


@pytest.fixture
async def channel(address):
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


@pytest.mark.both_engines
async def test_infer_refuses_it(channel, data):
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(data, timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "which is the most for a request" in refused.value.details()


@pytest.mark.both_engines
async def test_a_stream_refuses_it_and_goes_on(channel, data):
    infer = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    wanted = fresh()
    wanted.id = "wanted"
    answers = infer(iter([data, wanted.SerializeToString()]), timeout=60)
    first, second = [v2.ModelStreamInferResponse.FromString(answer) async for answer in answers]
    assert "which is the most for a request" in first.error_message
    assert second.infer_response.id == "wanted"


async def test_explain_refuses_it(stack, data):
    async with grpc.aio.insecure_channel(stack.router) as channel:
        explain = channel.unary_unary("/ringmesh.router.v1.RouterService/Explain")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await explain(wire.field(1, data), timeout=60)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        told = router_pb2.ExplainResponse.FromString(
            await explain(router_pb2.ExplainRequest(request=fresh()).SerializeToString(), timeout=60)
        )
    assert told.key


async def test_lists_of_other_requests_are_bounded_too(stack):
    async with grpc.aio.insecure_channel(stack.workers[0]) as channel:
        execute = channel.unary_unary("/ringmesh.inference.v1.InferenceWorkerService/Execute")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await execute(b"\x0a\0" * 1_000_000, timeout=60)
        assert "more than 16384 items" in refused.value.details()
        load = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await load(b"\x1a\0" * 1_000_000, timeout=60)
        assert "more than 16384 items" in refused.value.details()
    async with grpc.aio.insecure_channel(stack.cache) as channel:
        many = channel.unary_unary("/ringmesh.cache.v1.CacheService/GetMany")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await many(b"\x0a\0" * 2_000_000, timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
