"""Deadlines of callers that share one computation, on the router."""

import asyncio

import grpc
import pytest

from tests.system.test_cache import INFER, fresh

pytestmark = pytest.mark.both_engines


async def test_joined_callers_each_get_their_own_deadline(stack):
    request = fresh("slow").SerializeToString()
    async with grpc.aio.insecure_channel(stack.router) as channel:
        infer = channel.unary_unary(INFER)
        patient = [asyncio.ensure_future(infer(request, timeout=30)) for _ in range(2)]
        hasty = await asyncio.gather(*(infer(request, timeout=0.03) for _ in range(5)), return_exceptions=True)
        assert not any(call.done() for call in patient)
        answers = await asyncio.gather(*patient)
    assert {error.code() for error in hasty} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert answers[0] == answers[1]
