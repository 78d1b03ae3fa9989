"""Whatever a Redis server answers, those that look something up are told."""

import asyncio

import pytest

from cache.tiers.breaker import Breaker
from cache.tiers.redis_node import GivenUpError, RedisNode
from cache.tiers.shared_tier import ERRORS
from services.runtime.telemetry.metrics import Counter, Histogram


class Client:
    """Answers look-ups with `replies`."""

    def __init__(self, replies):
        self.replies = replies

    async def mget(self, names):
        if isinstance(self.replies, Exception):
            raise self.replies
        return self.replies

    async def aclose(self):
        pass


def node(replies):
    return RedisNode(
        "r:1",
        Client(replies),
        budget_seconds=10.0,
        breaker=Breaker(lambda: 0.0),
        one_slot=True,
        on_failure=lambda: None,
        on_fill=lambda *_: None,
        get_times=Histogram(),
        set_times=Histogram(),
        errors=Counter(ERRORS),
    )


@pytest.mark.parametrize("nonsense", [[], [b"one"], 7, None, b"ab", [1, 2], ["a", "b"], KeyError("x")])
async def test_a_look_up_that_is_answered_with_nonsense_is_given_up(nonsense):
    made = node(nonsense)
    async with asyncio.timeout(5):
        replies = await asyncio.gather(made.get(b"a"), made.get(b"b"))
    assert all(isinstance(reply, GivenUpError) for reply in replies)
    await made.close()


async def test_what_is_held_and_what_is_not_is_told():
    made = node([b"frame", None])
    assert await asyncio.gather(made.get(b"a"), made.get(b"b")) == [b"frame", None]
    await made.close()


async def test_a_look_up_under_way_is_given_up_when_the_node_is_closed():
    made = node([b"frame"])
    made.client.mget = lambda names: asyncio.Event().wait()
    waits = asyncio.create_task(made.get(b"a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await made.close()
    async with asyncio.timeout(5):
        assert isinstance(await waits, GivenUpError)
