"""Quotas, priorities and overload, as callers see them."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.system.test_cache import INFER, fresh

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def router(start_router, stack):
    return start_router(stack.workers, stack.redis_url, quotas="acme=2,*=1000").address


async def call(channel, request, *metadata):
    """The status code, and the error where it is one."""
    try:
        await channel.unary_unary(INFER)(request.SerializeToString(), metadata=metadata, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code(), error
    return grpc.StatusCode.OK, None


@pytest.mark.both_engines
async def test_a_tenant_over_its_quota_is_told_when_to_retry_and_still_gets_hits(router):
    acme = ("ringmesh-tenant", "acme")
    async with grpc.aio.insecure_channel(router) as channel:
        known = fresh()
        assert (await call(channel, known, acme))[0] == grpc.StatusCode.OK
        while (error := (await call(channel, fresh(), acme))[1]) is None:
            pass
        assert error.code() == EXHAUSTED
        assert "'acme' has used up its quota of 2 " in error.details()
        (detail,) = rpc_status.from_call(error).details
        retry = error_details_pb2.RetryInfo()
        assert detail.Unpack(retry)
        assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 0.5
        assert 0 < int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) <= 500
        assert (await call(channel, known, acme))[0] == grpc.StatusCode.OK
        assert (await call(channel, fresh(), ("ringmesh-tenant", "other")))[0] == grpc.StatusCode.OK


async def test_bytes_and_requests_at_once_are_limited_by_tenant(start_router, stack):
    limits = {"byte_quotas": "acme=1", "concurrency_quotas": "other=1", "cache_quotas": "*=0.5"}
    router = await asyncio.to_thread(start_router, stack.workers, None, **limits)
    async with grpc.aio.insecure_channel(router.address) as channel:
        answers = [await call(channel, fresh(), ("ringmesh-tenant", "acme")) for _ in range(2)]
        assert [code for code, _ in answers] == [grpc.StatusCode.OK, EXHAUSTED]
        error = answers[1][1]
        assert "tenant 'acme' has used up its quota of 1 bytes of requests a second; retry in " in error.details()
        assert rpc_status.from_call(error).details
        slow = [call(channel, fresh("slow"), ("ringmesh-tenant", "other")) for _ in range(12)]
        answers = await asyncio.gather(*slow)
        assert {code for code, _ in answers} == {grpc.StatusCode.OK, EXHAUSTED}
        refused = [error for code, error in answers if code == EXHAUSTED]
        assert "tenant 'other' has 1 requests under way, as many as it may have at once" in refused[0].details()
        assert rpc_status.from_call(refused[0]).details
        assert (await call(channel, fresh(), ("ringmesh-tenant", "other")))[0] == grpc.StatusCode.OK


async def test_who_joined_a_request_that_is_refused_for_its_tenant_gets_an_answer(router):
    async with grpc.aio.insecure_channel(router) as channel:
        while (await call(channel, fresh(), ("ringmesh-tenant", "acme")))[0] != EXHAUSTED:
            pass
        request = fresh()
        codes = [code for code, _ in await asyncio.gather(
            *(call(channel, request, ("ringmesh-tenant", tenant)) for tenant in ["acme"] * 5 + ["other"] * 5)
        )]  # fmt: skip
        assert codes[5:] == [grpc.StatusCode.OK] * 5


async def test_an_unknown_priority_is_a_clear_error(stack):
    async with grpc.aio.insecure_channel(stack.router) as channel:
        code, error = await call(channel, fresh(), ("ringmesh-priority", "urgent"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "ringmesh-priority is one of sheddable, normal, critical, not 'urgent'"
