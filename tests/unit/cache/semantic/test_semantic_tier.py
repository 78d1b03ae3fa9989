"""What FT.SEARCH answers, and a Redis that cannot search. One that can: tests/system/test_semantic_redis.py."""

import time

import numpy as np
import pytest

from cache.semantic.semantic_index import Near, unit
from cache.semantic.semantic_tier import Document, SemanticTier, document_of
from cache.tiers.breaker import Breaker
from cache.tiers.entry import EntryFrames
from cache.tiers.shared_tier import SharedTier
from tests.valkeys import valkey_server

KEY = b"k" * 32


VECTOR = np.array([0.6, 0.8]).tobytes()
FIELDS = {b"distance": b"0.25", b"key": KEY, b"vector": VECTOR, b"seal": b"s" * 16}
FLAT = [part for pair in FIELDS.items() for part in pair]


@pytest.mark.parametrize(
    ("reply", "is_read"),
    [
        ({b"total_results": 1, b"results": [{b"extra_attributes": FIELDS}]}, True),
        ([1, b"name", FLAT], True),
        ({b"total_results": 0, b"results": []}, False),
        ([0], False),
        ([1, b"name", FLAT[:4]], False),
        ([1, b"name", FLAT[:3]], False),
        (b"OK", False),
        (None, False),
    ],
)
def test_the_reply_is_read_in_both_protocols_and_a_strange_one_is_none(reply, is_read):
    assert document_of(reply) == (Document(KEY, VECTOR, b"s" * 16) if is_read else None)


class Searching:
    """A shared tier in whose Redis a search finds `fields`."""

    def __init__(self, **fields):
        self.frames = EntryFrames("secret")
        self.budget_seconds = 1.0
        self.is_skipped = False
        self._fields = {name.encode(): value for name, value in fields.items()}

    async def run(self, name, seconds, *command):
        return [1, b"name", [part for pair in self._fields.items() for part in pair]]


async def nearest(secret="secret", group=b"g", sealed_vector=None, key=KEY, vector=(0.6, 0.8)):
    stored = unit(np.array(vector)).tobytes()
    seal = EntryFrames(secret).seal_vector(group, sealed_vector or stored, KEY)
    tier = SemanticTier(Searching(key=key, vector=stored, seal=seal))
    return await tier.nearest(b"g", np.array([1.2, 1.6]), 0.9)


async def test_a_document_is_believed_only_as_a_process_of_the_fleet_wrote_it():
    near = await nearest()
    assert near.key == KEY
    assert near.similarity == pytest.approx(1.0, abs=1e-6)
    assert await nearest(secret="a guess") is None
    assert await nearest(group=b"of another model") is None
    assert await nearest(key=b"o" * 32) is None
    assert await nearest(sealed_vector=unit(np.array([1.0, 0.0])).tobytes()) is None
    assert await nearest(vector=(0.6, 0.8, 0.0)) is None
    assert await nearest(vector=(1.0, 0.0)) is None


async def test_a_redis_that_cannot_search_is_left_alone_for_a_minute_and_this_process_answers():
    now = 1000.0
    with valkey_server() as valkey:
        shared = SharedTier(
            valkey.connection_url,
            EntryFrames("secret"),
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
