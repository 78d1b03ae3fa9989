"""What a peer region answers is believed only with the seal of a process that knows the secret."""

import pytest
from ringmesh.cache.v1 import cache_pb2

from cache.regions.peer_regions import PeerError, PeerRegion
from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames

KEYS = [b"a" * 32, b"b" * 32]
FRAMES = EntryFrames("secret")


@pytest.fixture
async def region(monkeypatch):
    region = PeerRegion("eu", "127.0.0.1:1", Breaker(lambda: 0.0), FRAMES)
    yield region
    await region.close()


def answering(region, *results):
    async def fetch(data, **_):
        return cache_pb2.FetchResponse(results=results).SerializeToString()

    region._fetch = fetch


def result(seal, value=b""):
    return cache_pb2.GetResponse(entry=cache_pb2.Entry(value=value, compute_us=7, created_at_ms=8, seal=seal))


async def test_a_sealed_answer_is_taken(region):
    answering(region, result(FRAMES.seal(KEYS[0], Entry(b"", 7, 8))), cache_pb2.GetResponse())
    first, second = await region.get_many(KEYS)
    assert (first.value, first.compute_us, first.created_at_ms) == (b"", 7, 8)
    assert second is None
    assert region.unsealed == 0


@pytest.mark.parametrize(
    "forged",
    [
        result(b""),
        result(EntryFrames("a guess").seal(KEYS[0], Entry(b"", 7, 8))),
        result(FRAMES.seal(KEYS[1], Entry(b"", 7, 8))),
        result(FRAMES.seal(KEYS[0], Entry(b"", 7, 9))),
        result(FRAMES.seal(KEYS[0], Entry(b"\xff", 7, 8)), b"\xff"),
    ],
    ids=["none", "of another secret", "of another key", "of another answer", "of no answer"],
)
async def test_any_other_answer_is_a_miss_and_counted(region, forged):
    answering(region, forged)
    assert await region.get_many(KEYS[:1]) == [None]
    assert region.unsealed == 1


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_another_number_of_answers_than_keys_that_were_asked_for_is_refused(region, count):
    answering(region, *[cache_pb2.GetResponse()] * count)
    with pytest.raises(PeerError, match=f"answered {count} of 2"):
        await region.get_many(KEYS)
