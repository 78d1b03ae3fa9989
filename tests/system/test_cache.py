"""Compute once, remember everywhere: outcomes as callers see them."""

import asyncio
import uuid

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

INFER = "/inference.GRPCInferenceService/ModelInfer"
STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"


def fresh(model="mlp", **fields):
    """A request nobody has sent before."""
    shape = (1, 64) if model == "mlp" else (1, 1)
    array = np.random.default_rng(uuid.uuid4().int).random(shape, dtype=np.float32)
    request = v2.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()], **fields)
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    return request


async def infer(channel, request, metadata=()):
    """(response, trailing metadata)"""
    call = channel.unary_unary(INFER)(request.SerializeToString(), timeout=120, metadata=metadata)
    response = v2.ModelInferResponse.FromString(await call)
    return response, dict(await call.trailing_metadata())


async def outcome(channel, request):
    return (await infer(channel, request))[1]["ringmesh-cache"]


async def statistics(channel, model):
    request = v2.ModelStatisticsRequest(name=model)
    data = await channel.unary_unary(STATISTICS)(request.SerializeToString(), timeout=60)
    return v2.ModelStatisticsResponse.FromString(data).model_stats[0]


async def computed(channel, model):
    return (await statistics(channel, model)).inference_count


@pytest.mark.both_engines
async def test_the_second_answer_is_a_hit_and_the_same_to_the_byte(channel):
    request = fresh()
    first, told_first = await infer(channel, request)
    second, told_second = await infer(channel, request)
    assert (told_first["ringmesh-cache"], told_second["ringmesh-cache"]) == ("miss", "hit-local")
    assert first.SerializeToString() == second.SerializeToString()
    assert told_first["ringmesh-worker"].startswith("worker")
    assert told_first["ringmesh-compute-us"] == told_second["ringmesh-compute-us"] != "0"
    assert len(told_second["ringmesh-trace-id"]) == 32


@pytest.mark.both_engines
async def test_an_answer_from_the_cache_has_the_id_of_its_own_request(channel):
    request = fresh(id="first")
    await infer(channel, request)
    request.id = "second"
    response, told = await infer(channel, request)
    assert (response.id, told["ringmesh-cache"]) == ("second", "hit-local")


@pytest.mark.both_engines
async def test_equal_requests_in_flight_are_computed_once(channel):
    request = fresh("slow")
    answers = await asyncio.gather(*(infer(channel, request) for _ in range(50)))
    outcomes = [told["ringmesh-cache"] for _, told in answers]
    assert outcomes.count("miss") == 1
    # The last ones may come when the answer is there.
    assert {"joined", "miss"} <= {*outcomes} <= {"joined", "miss", "hit-local"}
    assert len({response.SerializeToString() for response, _ in answers}) == 1


@pytest.mark.both_engines
async def test_concurrent_mixed_requests_each_get_their_own_answer(channel):
    requests = [fresh(id=str(index)) for index in range(200)]
    alone = [await infer(channel, request) for request in requests[:20]]
    mixed = await asyncio.gather(*(infer(channel, request) for request in requests * 2))
    for request, (response, _) in zip(requests * 2, mixed, strict=True):
        assert response.id == request.id
    by_id = {response.id: response for response, _ in mixed}
    for response, _ in alone:
        assert by_id[response.id].SerializeToString() == response.SerializeToString()
    assert len({response.raw_output_contents[0] for response in by_id.values()}) == 200


async def test_another_router_finds_the_answer_in_redis(channel, stack, start_router):
    request = fresh()
    response, _ = await infer(channel, request)
    async with grpc.aio.insecure_channel(start_router(stack.workers, stack.redis_url).address) as other:
        async with asyncio.timeout(60):
            while True:  # the fill is written behind the answer
                again, told = await infer(other, request)
                if told["ringmesh-cache"] != "miss":
                    break
                request = fresh()
                response, _ = await infer(channel, request)
    assert told["ringmesh-cache"] == "hit-shared"
    assert again.SerializeToString() == response.SerializeToString()


async def test_a_model_with_a_random_operator_is_never_cached(channel):
    request = fresh("random")
    first, told = await infer(channel, request)
    second, again = await infer(channel, request)
    assert told["ringmesh-cache"] == again["ringmesh-cache"] == "bypass"
    assert first.raw_output_contents != second.raw_output_contents


async def test_tenants_share_the_answers_of_a_model_unless_it_is_scoped_by_tenant(channel):
    outcomes = {}
    for model in ("slow", "scoped"):
        request = fresh(model)
        for tenant in ("a", "b", "b"):
            _, told = await infer(channel, request, [("ringmesh-tenant", tenant)])
            outcomes.setdefault(model, []).append(told["ringmesh-cache"])
    assert outcomes["slow"] == ["miss", "hit-local", "hit-local"]
    assert outcomes["scoped"] == ["miss", "miss", "hit-local"]


@pytest.mark.both_engines
@pytest.mark.parametrize("name", ["ringmesh-tenant", "ringmesh-priority"])
@pytest.mark.parametrize("values", [("", "normal"), ("normal", ""), ("normal", "normal")])
async def test_who_says_twice_who_it_is_gets_no_answer_at_all(channel, name, values):
    """Not even one that is cached: the memo once took the first value, and the key the second."""
    request = fresh("scoped")
    await infer(channel, request)
    await infer(channel, request)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(channel, request, [(name, value) for value in values])
    assert (refused.value.code(), refused.value.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{name} is given twice",
    )


async def test_a_tenant_that_is_too_long_is_refused(channel):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(channel, fresh("scoped"), [("ringmesh-tenant", "x" * 257)])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_naming_all_outputs_finds_the_answer_of_a_request_that_names_none(channel):
    request = fresh()
    await infer(channel, request)
    request.outputs.add(name="y")
    assert (await infer(channel, request))[1]["ringmesh-cache"] == "hit-local"


async def test_a_sequence_is_never_cached(channel):
    request = fresh()
    request.parameters["sequence_id"].int64_param = 5
    for _ in range(2):
        _, told = await infer(channel, request)
        assert told["ringmesh-cache"] == "bypass"


async def test_a_sequence_stays_on_one_worker(channel):
    for sequence in ("a", "b", "c", "d"):
        workers = set()
        for _ in range(8):
            request = fresh()
            request.parameters["sequence_id"].string_param = sequence
            workers.add((await infer(channel, request))[1]["ringmesh-worker"])
        assert len(workers) == 1


async def test_a_failure_is_not_cached(channel):
    request = fresh()
    request.inputs[0].shape[:] = [2, 64]
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel, request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
