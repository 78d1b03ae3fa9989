"""`cache-control` beside a request means what it means in HTTP."""

import asyncio

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.system.test_cache import INFER, fresh


async def infer(channel, request, control=None):
    """(response, outcome)"""
    metadata = (("cache-control", control),) if control is not None else ()
    call = channel.unary_unary(INFER)(request.SerializeToString(), timeout=120, metadata=metadata)
    response = v2.ModelInferResponse.FromString(await call)
    return response, dict(await call.trailing_metadata())["ringmesh-cache"]


async def refused(channel, request, control):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel, request, control)
    return caught.value


async def test_no_store_keeps_nothing_and_takes_what_is_kept(channel):
    request = fresh()
    assert [(await infer(channel, request, "no-store"))[1] for _ in range(2)] == ["miss", "miss"]
    await infer(channel, request)
    assert (await infer(channel, request, "no-store"))[1] == "hit-local"


async def test_no_cache_computes_anew_and_keeps_the_answer(channel):
    request = fresh()
    first, _ = await infer(channel, request, "no-cache")
    assert (await infer(channel, request))[1] == "hit-local"
    again, outcome = await infer(channel, request, "no-cache")
    assert (outcome, again.raw_output_contents) == ("miss", first.raw_output_contents)


async def test_max_age_takes_what_is_young_enough(channel):
    request = fresh()
    await infer(channel, request)
    assert (await infer(channel, request, "max-age=3600"))[1] == "hit-local"
    async with asyncio.timeout(60):
        while (await infer(channel, request, "max-age=0, no-store"))[1] != "miss":  # until a millisecond is over
            pass


async def test_only_if_cached_never_computes(channel):
    request = fresh()
    error = await refused(channel, request, "only-if-cached")
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "only-if-cached" in error.details()
    assert (await infer(channel, request))[1] == "miss"
    assert (await infer(channel, request, "only-if-cached"))[1] == "hit-local"
    assert (await refused(channel, request, "only-if-cached, no-cache")).code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_only_if_cached_refuses_what_is_never_cached(channel):
    assert (await refused(channel, fresh("random"), "only-if-cached")).code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_max_age_that_is_no_number_is_refused(channel):
    error = await refused(channel, fresh(), "max-age=soon")
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "max-age=soon" in error.details()


async def test_several_headers_count_as_one(channel):
    request = fresh()
    metadata = (("cache-control", "no-store"), ("cache-control", "no-cache"))
    await channel.unary_unary(INFER)(request.SerializeToString(), metadata=metadata, timeout=120)
    assert (await infer(channel, request))[1] == "miss"
