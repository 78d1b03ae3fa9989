"""Rows are requests too: what a batch costs on the workers."""

import asyncio

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from tests.models import mean_over_rows, mlp, wide
from tests.system.test_cache import infer


def fresh_rows(count):
    return np.random.default_rng().normal(size=(count, 64)).astype(np.float32)


def batch(rows, model="row_cached"):
    request = v2.ModelInferRequest(model_name=model, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    return request


async def rows_computed(channel, model="row_cached"):
    stub = v2_grpc.GRPCInferenceServiceStub(channel)
    (stats,) = (await stub.ModelStatistics(v2.ModelStatisticsRequest(name=model))).model_stats
    return stats.inference_count


async def test_a_batch_of_eight_of_which_six_are_known_costs_two(channel, stack):
    rows = fresh_rows(8)
    await infer(channel, batch(rows[2:6]))
    await infer(channel, batch(rows[:1]))
    await infer(channel, batch(rows[7:]))
    before = await rows_computed(channel)
    mixed = rows[[6, 5, 1, 0, 7, 2, 3, 4]]
    response, told = await infer(channel, batch(mixed))
    assert await rows_computed(channel) - before == 2
    assert (told["ringmesh-cache"], told["ringmesh-rows"]) == ("miss", "6/8")
    async with grpc.aio.insecure_channel(stack.workers[0]) as worker:
        computed, _ = await infer(worker, batch(mixed))
    assert response.SerializeToString() == computed.SerializeToString()


async def test_rows_of_a_batch_and_requests_of_one_row_share_their_answers(channel):
    rows = fresh_rows(3)
    whole, _ = await infer(channel, batch(rows))
    for row in range(3):
        alone, told = await infer(channel, batch(rows[row : row + 1]))
        assert told["ringmesh-cache"] == "hit-local"
        assert alone.raw_output_contents[0] == whole.raw_output_contents[0][40 * row : 40 * (row + 1)]
    again, told = await infer(channel, batch(rows[::-1].copy()))
    assert (told["ringmesh-cache"], told["ringmesh-rows"]) == ("hit-local", "3/3")
    _, told = await infer(channel, batch(rows[::-1].copy()))
    assert "ringmesh-rows" not in told
    assert again.outputs[0].shape == [3, 10]


async def test_batches_that_overlap_in_flight_agree_on_each_row(channel):
    """That each is computed once is a unit test's to say: a worker that is not heard for a second on a busy machine has
    its requests sent elsewhere."""
    rows = fresh_rows(40)
    answers = await asyncio.gather(*(infer(channel, batch(rows[start : start + 8])) for start in range(33)))
    for start, (response, _) in enumerate(answers):
        first = (
            answers[0][0].raw_output_contents[0] if start == 0 else answers[start - 1][0].raw_output_contents[0][40:]
        )
        assert response.raw_output_contents[0][:280] == first[:280]


async def test_a_batch_and_requests_of_its_rows_in_flight_agree_on_each_row(channel):
    rows = fresh_rows(16)
    singles = [infer(channel, batch(rows[row : row + 1])) for row in range(16)]
    batches = [infer(channel, batch(rows[start : start + 8])) for start in (0, 8, 4)]
    answers = await asyncio.gather(*batches[:1], *singles, *batches[1:])
    alone = [response.raw_output_contents[0] for response, _ in answers[1:17]]
    for (response, _), start in zip([answers[0], *answers[17:]], (0, 8, 4), strict=True):
        assert response.raw_output_contents[0] == b"".join(alone[start : start + 8])


async def test_a_mistake_in_a_batch_is_told_as_ever(channel):
    wrong = batch(fresh_rows(4))
    wrong.inputs[0].shape[:] = [4, 63]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel, wrong)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_says_whether_its_rows_are_cached_and_why_not(tmp_path, start_worker):
    mlp(tmp_path)
    wide(tmp_path, "Sin")
    folder = mean_over_rows(tmp_path)
    worker = start_worker("rows", models=tmp_path)
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = v2_grpc.GRPCInferenceServiceStub(channel)

        async def told(name):
            config = (await stub.ModelConfig(v2.ModelConfigRequest(name=name))).config
            return config.parameters["ringmesh_row_cache"].string_value

        assert await told("sin") == "yes"
        assert "row caching pays from 200 us" in await told("mlp")
        assert (await told("mean_over_rows")).startswith("no: rows are not proven independent: node 'mean'")
        flag = 'parameters { key: "ringmesh_row_cache" value { string_value: "%s" } }'
        (tmp_path / "mlp" / "config.pbtxt").write_text(flag % "true")
        (tmp_path / "sin" / "config.pbtxt").write_text(flag % "false")
        for name in ("mlp", "sin"):
            await stub.RepositoryModelLoad(v2.RepositoryModelLoadRequest(model_name=name))
        assert (await told("mlp"), await told("sin")) == ("yes", "no: its config.pbtxt says so")
        (folder.parent / "config.pbtxt").write_text(flag % "true")
        with pytest.raises(grpc.aio.AioRpcError, match=r"ringmesh_row_cache is true .* not proven independent"):
            await stub.RepositoryModelLoad(v2.RepositoryModelLoadRequest(model_name="mean_over_rows"))
