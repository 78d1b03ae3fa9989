"""Copying from peer regions goes on whatever a peer answers."""

import asyncio

from ringmesh.cache.v1 import cache_pb2

from cache.regions.peer_regions import PeerRegion
from cache.regions.replication import replicate
from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames

KEYS = [bytes([number]) * 32 for number in range(3)]

FRAMES = EntryFrames("secret")


class Shared:
    """Holds what was copied."""

    def __init__(self):
        self.held = {}

    async def get(self, key):
        return self.held.get(key)

    def put(self, key, entry):
        self.held[key] = entry


def peer(fetched):
    """A region whose answers are `fetched`, serialized, whatever is asked for."""
    made = PeerRegion("far", "127.0.0.1:1", Breaker(lambda: 0.0), FRAMES)

    async def valuable(data, **_):
        return cache_pb2.ListValuableResponse(keys=KEYS).SerializeToString()

    async def fetch(data, **_):
        return fetched

    made._list, made._fetch = valuable, fetch
    return made


def results(count):
    seals = [FRAMES.seal(key, Entry(b"", 1, 1)) for key in KEYS[:count]]
    entries = [cache_pb2.Entry(value=b"", compute_us=1, created_at_ms=1, seal=seal) for seal in seals]
    return cache_pb2.FetchResponse(
        results=[cache_pb2.GetResponse(entry=entry) for entry in entries]
    ).SerializeToString()


async def test_a_peer_that_returns_too_few_results_does_not_keep_others_from_being_copied():
    shared = Shared()
    peers = [peer(results(1)), peer(b"\xff\xff"), peer(results(3))]
    replication = asyncio.create_task(replicate(peers, shared, 1 << 30))
    async with asyncio.timeout(60):
        while len(shared.held) < 3:
            await asyncio.sleep(0)
    replication.cancel()
    for each in peers:
        await each.close()


async def test_a_look_up_that_a_peer_answers_with_nonsense_is_a_miss():
    for nonsense in (results(2), b"\xff\xff"):
        each = peer(nonsense)
        assert await each.get(KEYS[0]) is None
        await each.close()
