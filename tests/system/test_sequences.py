"""Sequences as tritonclient sends them, on router and worker."""

import asyncio
import collections
import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.scheduling.sequencer import MAX_SEQUENCES
from tests import models
from tests.system.test_cache import INFER

_NEVER_IDLE = "max_sequence_idle_microseconds: 3600000000"


def one(value):
    tensor = triton.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.array([[value]], np.float32))
    return [tensor]


def test_a_sequence_adds_up(client):
    steps = [(1, True, False), (2, False, False), (3, False, True)]
    answers = [
        client.infer("accumulator", one(value), sequence_id=901, sequence_start=start, sequence_end=end)
        for value, start, end in steps
    ]
    assert [answer.as_numpy("sum").item() for answer in answers] == [1, 3, 6]


@pytest.mark.both_engines
def test_a_stream_keeps_the_order_of_each_sequence(client):
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result))
    for value in range(50):
        for sequence in (911, 912):
            client.async_stream_infer(
                "accumulator",
                one(value + sequence),
                request_id=str(sequence),
                sequence_id=sequence,
                sequence_start=value == 0,
                sequence_end=value == 49,
            )
    sums: dict[str, list[float]] = {"911": [], "912": []}
    for _ in range(100):
        answer = answers.get(timeout=60)
        sums[answer.get_response().id].append(answer.as_numpy("sum").item())
    client.stop_stream()
    for sequence, got in sums.items():
        assert got == np.cumsum([value + int(sequence) for value in range(50)]).tolist()


def test_a_sequence_that_did_not_begin_is_refused(client):
    with pytest.raises(triton.InferenceServerException, match="no sequence 921") as caught:
        client.infer("accumulator", one(1), sequence_id=921)
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_the_sequences_of_a_lost_worker_begin_again_elsewhere(start_worker, start_router):
    workers = [start_worker(name) for name in ("a", "b")]
    router = start_router([worker.address for worker in workers], None)
    with triton.InferenceServerClient(router.address) as client:
        # So many that each worker has some: their ports decide which.
        sequences = range(1, 26)
        for sequence in sequences:
            client.infer("accumulator", one(1), sequence_id=sequence, sequence_start=True)
        workers[0].process.kill()
        workers[0].process.wait()
        lost = set()
        for sequence in sequences:
            try:
                assert client.infer("accumulator", one(1), sequence_id=sequence).as_numpy("sum").item() == 2
            except triton.InferenceServerException as error:
                lost.add((sequence, error.status()))
        assert 0 < len(lost) < len(sequences)
        for sequence, status in lost:
            assert status == "StatusCode.FAILED_PRECONDITION"
            answer = client.infer("accumulator", one(1), sequence_id=sequence, sequence_start=True)
            assert answer.as_numpy("sum").item() == 1


@pytest.mark.proof
async def test_more_sequences_than_a_worker_keeps_are_refused_and_those_it_keeps_go_on(tmp_path, start_worker):
    config = models.accumulator(tmp_path).parent / "config.pbtxt"
    config.write_text(config.read_text().replace("max_sequence_idle_microseconds: 5000000", _NEVER_IDLE))
    worker = start_worker("full", models=tmp_path)
    async with grpc.aio.insecure_channel(worker.address) as channel:
        infer = channel.unary_unary(INFER)

        async def step(sequence, **flags):
            request = v2.ModelInferRequest(model_name="accumulator", raw_input_contents=[np.float32(1).tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
            request.parameters["sequence_id"].int64_param = sequence
            for name, flag in flags.items():
                request.parameters[f"sequence_{name}"].bool_param = flag
            try:
                answer = v2.ModelInferResponse.FromString(await infer(request.SerializeToString(), timeout=120))
                return np.frombuffer(answer.raw_output_contents[0], np.float32)[0]
            except grpc.aio.AioRpcError as error:
                return error.code().name

        first = 1_000_000
        begun = collections.Counter()
        for start in range(0, MAX_SEQUENCES + 600, 100):
            steps = (step(first + start + number, start=True) for number in range(100))
            begun.update(await asyncio.gather(*steps))
        assert begun.keys() == {1.0, "RESOURCE_EXHAUSTED"}
        assert begun[1.0] == MAX_SEQUENCES
        going_on = await asyncio.gather(*(step(first + number, end=True) for number in range(100)))
        assert going_on == [2.0] * 100
        assert await step(first - 1, start=True) == 1.0
