import asyncio

import pytest

from cache.keys.invalidation import InvalidationLog
from cache.mesh import Mesh
from cache.policy.freshness import Freshness, tightest
from cache.policy.refusals import Refusals
from cache.policy.renewals import _MOST_AT_ONCE, Renewals
from cache.policy.worth_asking import Subject
from cache.regions.peer_regions import PeerRegions
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from services.runtime.errors import UnavailableError
from tests.unit.turns import turns


@pytest.fixture
def renewals():
    return Renewals()


async def test_of_many_hits_on_an_old_answer_one_renews_it(renewals):
    gate, runs = asyncio.Event(), []

    async def work():
        runs.append(1)
        await gate.wait()
        return "computed"

    for _ in range(1000):
        renewals.begin(b"key", work)
        await asyncio.sleep(0)
    gate.set()
    await turns()
    assert (len(runs), renewals.counts["computed"]) == (1, 1)
    renewals.begin(b"key", work)
    await asyncio.sleep(0)
    assert len(runs) == 2


async def test_what_failed_is_left_alone_for_a_while(renewals):
    runs = []

    async def work():
        runs.append(1)
        raise UnavailableError("no worker")

    for _ in range(1000):
        renewals.begin(b"key", work)
        await asyncio.sleep(0)
    assert (len(runs), renewals.counts["failed"]) == (1, 1)


async def test_a_bounded_number_runs_at_once(renewals):
    gate, runs = asyncio.Event(), []

    async def work():
        runs.append(1)
        await gate.wait()
        return "computed"

    for index in range(3 * _MOST_AT_ONCE):
        renewals.begin(b"%d" % index, work)
    await asyncio.sleep(0)
    assert len(runs) == _MOST_AT_ONCE
    gate.set()
    await turns()
    renewals.begin(b"one more", work)
    await asyncio.sleep(0)
    assert len(runs) == _MOST_AT_ONCE + 1


def test_an_answer_is_fresh_then_stale_then_over():
    ages = [(age, Freshness(100, 50).is_stale(1000, 1000 + age), Freshness(100, 50).is_over(1000, 1000 + age))
            for age in (0, 99, 100, 149, 150)]  # fmt: skip
    assert [(stale, over) for _, stale, over in ages] == [
        (False, False),
        (False, False),
        (True, False),
        (True, False),
        (True, True),
    ]


def test_an_ensemble_is_as_fresh_as_the_shortest_lived_of_its_steps():
    assert tightest(None, None) is None
    assert tightest(Freshness(5), None) == tightest(None, Freshness(5)) == Freshness(5)
    assert tightest(Freshness(5, 9), Freshness(7, 1)) == Freshness(5, 1)


class Empty:
    """A shared tier without entries."""

    async def get_answer(self, key, on_reply=None):
        return None


async def test_a_renewal_that_fails_however_it_may_gives_its_lease_back():
    purges = InvalidationLog(None, "test", 1.0)
    mesh = Mesh(LocalTier(1 << 20), None, purges, PeerRegions([], purges), Refusals(60))
    mesh.shared = Empty()
    key = b"k" * 32

    async def compute():
        raise ValueError("nobody foresaw it")

    mesh.renew(key, Entry(b"old", 1), compute, Subject("m", b"k" * 16, 1))
    async with asyncio.timeout(60):
        while not mesh.renewals.counts["failed"]:
            await asyncio.sleep(0)
    assert await mesh._leases.take(key, 1000) is not None
