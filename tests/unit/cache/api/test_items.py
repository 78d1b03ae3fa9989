import asyncio

import pytest

from cache.api.items import Item, ItemId, Items
from cache.keys.epochs import Epochs


def item(compute_ms=100, fresh_until_ms=10_000):
    return Item(b"", compute_ms * 1000, 0, fresh_until_ms)


def test_an_item_without_an_end_is_never_due():
    forever = item(fresh_until_ms=0)
    assert not forever.is_stale(1e15)
    assert not forever.is_due(1e15, 0.0)


def test_xfetch_renews_early_with_the_probability_of_its_paper():
    # P(early) with t left is exp(-t / delta): 37 % where as much is left as computing takes.
    chances = [(index + 0.5) / 10_000 for index in range(10_000)]
    for left_ms, expected in ((100, 0.368), (200, 0.135), (0, 1.0)):
        share = sum(item().is_due(10_000 - left_ms, chance) for chance in chances) / len(chances)
        assert abs(share - expected) < 0.001


def test_what_takes_longer_to_compute_is_renewed_earlier():
    assert item(compute_ms=1000).is_due(9_000, 0.3)
    assert not item(compute_ms=10).is_due(9_000, 0.3)


class Redis:
    """Holds one lease at a time. Each command takes a turn, which `turns` hands out, though its caller has left."""

    budget_seconds, ttl_ms = 0.1, 1000

    def __init__(self):
        self.token, self.commands, self.turns = 0, 0, asyncio.Queue()

    async def _turn(self):
        self.commands += 1
        await self.turns.get()

    async def get(self, name):
        await self._turn()

    async def run(self, name, seconds, _, script, keys, *arguments):
        return await asyncio.shield(asyncio.ensure_future(self._run(script, arguments)))

    async def _run(self, script, arguments):
        await self._turn()
        if "EXISTS" in script:
            self.token = "" if self.token else 7
            return self.token
        if self.token == int(arguments[-1]):
            self.token = 0
        return 0


class Mesh:
    def __init__(self):
        self.shared = Redis()
        self.purges = self
        self.is_known, self.oldest_ms, self.epochs = True, 0, Epochs({})


@pytest.mark.parametrize("command", [1, 2, 3])
async def test_a_caller_that_leaves_holds_no_lease(command):
    mesh = Mesh()
    redis = mesh.shared
    asking = asyncio.create_task(Items(mesh).get_or_lease(ItemId("a", "", b"k"), 60_000, 1))
    for number in range(1, command + 1):
        while redis.commands < number:
            await asyncio.sleep(0)
        if number < command:
            redis.turns.put_nowait(None)
    # In the middle of looking, of taking the lease, or of looking again.
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for _ in range(10):
        redis.turns.put_nowait(None)
        await asyncio.sleep(0.001)
    assert redis.token == 0
