"""Large responses travel in pieces and are never in a protobuf message; what is said is the same."""

import asyncio
import time

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.transport.local_channel import LocalConnection
from services.inference.api.envelope_socket import EnvelopeSocket
from services.inference.work_results import joined
from services.runtime.driver import ON_LOOP
from services.runtime.large_bytes import LARGE_BYTES, join_arrays
from services.runtime.large_result import SplitResult, pieces_of, take_apart
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc.rpc import Answer, Service
from services.runtime.rpc.server import Engine, Server

SERVICE = v2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
LOAD = inference_pb2.LoadReport(requests=3, estimated_wait_us=2**40, version=7)


def split(response, **fields):
    return SplitResult(inference_pb2.WorkResult(**fields), response)


def large(response, **timing):
    return split(response, model_digest=b"d" * 16, timing=inference_pb2.Timing(**timing))


RESULTS = st.lists(
    st.one_of(
        st.builds(large, st.binary(max_size=300), queue_us=st.integers(0, 2**60)),
        st.builds(split, st.binary(max_size=300), model_digest=st.binary(max_size=20)),
        st.builds(
            split, st.just(b""), failure=st.builds(inference_pb2.Failure, code=st.integers(1, 16), message=st.text())
        ),
    ),
    max_size=5,
)


@given(RESULTS, st.lists(st.integers(1, 40)))
def test_what_is_taken_apart_says_what_was_put_together_however_it_is_cut(results, sizes):
    whole = b"".join(pieces_of(results, LOAD))
    response = inference_pb2.ExecuteResponse.FromString(whole)
    assert [result.response for result in response.results] == [result.response for result in results]
    cut, position = [], 0
    for size in [*sizes, len(whole)]:
        cut.append(whole[position : position + size])
        position += size
    answer = take_apart(cut)
    taken = answer.results(inference_pb2.ExecuteResponse.FromString(answer.message))
    assert inference_pb2.ExecuteResponse.FromString(answer.message).load == LOAD
    for result, made in zip(results, taken, strict=True):
        assert (made.response, made.timing, made.model_digest) == (result.response, result.timing, result.model_digest)
        assert (made.HasField("failure"), made.failure) == (result.HasField("failure"), result.failure)


@pytest.mark.parametrize("said", [b"\x0a", b"\x0a\x7f", b"\x0a\x02\x0a\x05", b"\xff" * 12, b"\x0b", b"\x0a\x01\x0b"])
def test_what_is_no_envelope_is_refused(said):
    with pytest.raises(ValueError, match=r"wire type|ends beyond|without an end"):
        take_apart([said])


def test_who_joined_a_result_shares_its_response_and_not_its_message():
    first = large(b"x" * 10, queue_us=5)
    other = joined(first, time.monotonic_ns())
    assert (other.response, other.timing.queue_us, first.timing.joined) == (first.response, 5, False)
    assert other.timing.joined
    assert other.response is first.response


@given(st.lists(st.one_of(st.binary(max_size=9), st.lists(st.integers(-9, 9), max_size=9))))
def test_arrays_are_joined_as_their_bytes_are(parts):
    given = [part if isinstance(part, bytes) else np.array(part, np.int16) for part in parts]
    whole = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in given)
    assert join_arrays(given) == whole


def test_arrays_of_any_layout_are_joined_row_by_row():
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    assert (
        join_arrays([b"<", array.T, array[:, ::2], b">"]) == b"<" + array.T.tobytes() + array[:, ::2].tobytes() + b">"
    )


@pytest.fixture
async def connection(tmp_path):
    results = [large(b"%d" % number * LARGE_BYTES, queue_us=number) for number in range(3)]

    async def path(data, metadata, deadline):
        return Answer(b"", (), None, pieces_of(results, LOAD)) if data == b"large" else Answer(data, ())

    server = EnvelopeSocket(str(tmp_path), path, 1 << 20, lambda code: None)
    _, made = await asyncio.get_running_loop().create_unix_connection(LocalConnection, await server.start())
    made.server = server
    yield made
    made.close()
    await server.stop(1)


def begun(connection, data, order):
    answered = asyncio.get_running_loop().create_future()

    def done(answer):
        order.append(data)
        answered.set_result(answer)

    return answered, connection.begin([data], done)


async def test_what_comes_while_a_large_answer_is_sent_is_answered_between_its_parts(connection):
    order = []
    whole, _ = begun(connection, b"large", order)
    for number in range(3):
        assert await asyncio.wait_for(begun(connection, b"%d" % number, order)[0], 20) == b"%d" % number
    answer = await asyncio.wait_for(whole, 20)
    assert answer.responses == [b"%d" % number * LARGE_BYTES for number in range(3)]
    assert order == [b"0", b"1", b"2", b"large"]


async def test_a_large_answer_that_nobody_waits_for_any_more_is_not_sent_further(connection):
    order = []
    _, cancel = begun(connection, b"large", order)
    while not connection._parts:
        await asyncio.sleep(0)
    cancel()
    assert await asyncio.wait_for(begun(connection, b"next", order)[0], 20) == b"next"
    (other,) = connection.server.connections
    assert not other.is_sending
    assert connection._parts == {}
    assert order == [b"next"]


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("when", [b"at once", b"later"])
async def test_a_large_answer_of_a_fast_path_leaves_whole_on_either_engine(engine, when):
    pieces = [bytes([number]) * LARGE_BYTES for number in range(3)]
    after = []

    def answer():
        return Answer(b"body", (("told", "so"),), lambda: after.append(when), pieces)

    async def path(data, metadata, deadline):
        if data != b"at once":
            await ON_LOOP
        return answer()

    service = Service(SERVICE, {"ModelInfer": fast_path_handler(path)}, {"ModelInfer": path})
    server = Server(engine, "127.0.0.1:0", [service], max_message_bytes=1 << 20, max_connection_age=300)
    port = await server.start()
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(when, timeout=20)
        assert await call == b"body" + b"".join(pieces)
        assert ("told", "so") in tuple(await call.trailing_metadata())
    await server.stop(1)
    assert after == [when]
