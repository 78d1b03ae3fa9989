"""Requests found wrong, refused from memory where that is configured."""

import grpc
import pytest

from tests.system.test_cache import INFER, fresh, statistics

pytestmark = pytest.mark.proof


@pytest.mark.parametrize(("seconds", "asked"), [(0, 5), (60, 1)])
async def test_a_wrong_request_is_refused_alike_and_asks_a_worker_as_configured(stack, start_router, seconds, asked):
    request = fresh("slow")
    request.inputs[0].shape[:] = [2, 1]
    router = start_router(stack.workers, stack.redis_url, refusal_seconds=seconds)
    async with grpc.aio.insecure_channel(router.address) as channel:

        async def failures():
            return (await statistics(channel, "slow")).inference_stats.fail.count

        before = await failures()
        errors = set()
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(INFER)(request.SerializeToString(), timeout=60)
            errors.add((caught.value.code(), caught.value.details()))
        assert {code for code, _ in errors} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert len(errors) == 1
        assert await failures() - before == asked
