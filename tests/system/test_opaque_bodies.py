"""A router hands request bodies on as they came: it parses them to know what they ask, and serializes nothing anew."""

import asyncio

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.system.processes import free_address
from tests.system.test_cache import INFER, fresh

pytestmark = pytest.mark.both_engines

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Recorder(grpc.GenericRpcHandler):
    """Stands before a worker, hands calls on, and keeps the bodies of requests."""

    def __init__(self, worker):
        self._channel = grpc.aio.insecure_channel(worker)
        self.bodies = []

    def service(self, details):
        async def hand_on(request, _):
            if details.method.endswith("/Execute"):
                self.bodies += [item.request for item in inference_pb2.ExecuteRequest.FromString(request).items]
            return await self._channel.unary_unary(details.method)(request, timeout=60)

        return grpc.unary_unary_rpc_method_handler(hand_on)

    async def close(self):
        await self._channel.close()


@pytest.fixture
async def recorder(stack):
    """The worker of this stack behind it, at `address`."""
    made = Recorder(stack.workers[0])
    server = grpc.aio.server(handlers=[made])
    made.address = free_address()
    server.add_insecure_port(made.address)
    await server.start()
    yield made
    await server.stop(0)
    await made.close()


def field(number, value):
    """One with a length, that says it in two bytes where one would do."""
    assert len(value) < 128
    return bytes((number << 3 | 2, len(value) | 0x80, 0)) + value


def odd_bodies():
    """Right requests as no library of ours would write them."""
    request = fresh()
    (data,) = request.raw_input_contents
    tensor = request.inputs[0].SerializeToString()
    unknown = b"\xfa\x3e\x05later"  # field 1007, of a later version of the protocol
    raw = bytes((7 << 3 | 2, 0x80 | len(data) & 0x7F, len(data) >> 7)) + data
    yield unknown + raw + field(5, tensor) + field(1, b"other") + field(3, b"an id") + field(1, b"mlp")
    request = fresh()
    request.parameters["triton_something"].bool_param = True
    yield unknown + request.SerializeToString() + unknown


async def test_a_body_reaches_the_worker_byte_for_byte(start_router, recorder):
    router = await asyncio.to_thread(start_router, [recorder.address], None, audit_share=0)
    unary, uncached, streamed = ([*odd_bodies()] for _ in range(3))
    async with grpc.aio.insecure_channel(router.address) as channel:
        for body in unary:
            await channel.unary_unary(INFER)(body, timeout=60)
        for body in uncached:
            await channel.unary_unary(INFER)(body, timeout=60, metadata=(("cache-control", "no-store"),))
        call = channel.stream_stream(STREAM)(iter(streamed), timeout=60)
        answers = [v2.ModelStreamInferResponse.FromString(answer) async for answer in call]
    assert [answer.error_message for answer in answers] == ["", ""]
    assert sorted(recorder.bodies) == sorted(unary + uncached + streamed)
