"""Lanes of the native engine: answers given on its receiving thread, beside the event loop."""

import asyncio
import time

import grpc
import pytest

from services.runtime.fast_lane import FastLaneServer
from services.runtime.rpc import Answer

NAME = "test.Lanes"


async def serve(lane):
    """The server and a channel to it; what its lane does not answer, the handler does."""

    async def handle(data, context):
        return b"handled " + data

    server = FastLaneServer([], {f"/{NAME}/Call": lane})
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(handle)}
    server.add_registered_method_handlers(NAME, handlers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.insecure_channel(f"127.0.0.1:{port}")


async def test_a_lane_answers_while_the_event_loop_is_held_up():
    done = []
    server, channel = await serve(lambda data, _: Answer(b"at once " + data, (), lambda: done.append(data)))
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"warm", timeout=10) == b"at once warm"
        answer = call.future(b"x", timeout=10)
        end = time.monotonic() + 10
        while not answer.done() and time.monotonic() < end:
            time.sleep(0.001)  # noqa: ASYNC251, holds up the event loop
        assert answer.result(0) == b"at once x"
        assert done == [b"warm"]
        await asyncio.sleep(0)
        assert done == [b"warm", b"x"]
    await server.stop(0)


async def test_what_a_lane_does_not_answer_goes_to_the_handler_in_place_of_the_request():
    server, channel = await serve(lambda data, _: data.upper())
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"x", timeout=10) == b"handled X"
    await server.stop(0)


async def test_a_lane_that_fails_fails_that_call_alone():
    def lane(data, _):
        if data == b"bad":
            raise ValueError("secret")
        return Answer(data, ())

    server, channel = await serve(lane)
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, b"bad", timeout=10)
        assert failed.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in failed.value.details()
        assert await asyncio.to_thread(call, b"good", timeout=10) == b"good"
    await server.stop(0)


async def test_a_draining_server_turns_calls_away_from_its_lanes_too():
    server, channel = await serve(lambda data, _: Answer(data, ()))
    with channel:
        call = channel.unary_unary(f"/{NAME}/Call")
        assert await asyncio.to_thread(call, b"x", timeout=10) == b"x"
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0)
        with pytest.raises(grpc.RpcError) as failed:
            await asyncio.to_thread(call, b"x", timeout=10)
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        await stopping
