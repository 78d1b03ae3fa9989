"""What a purge removes from the memory of a process."""

import asyncio

import pytest

from cache.keys.epochs import EVERYTHING, model_scope, tenant_scope
from cache.keys.invalidation import InvalidationLog
from cache.keys.purge_sweep import PurgeSweep
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier

A, B = bytes(16), bytes([1]) * 16
MODELS = [(A, "a"), (B, "b")]


@pytest.fixture
def parts():
    """A tier with 10 answers of each model and 10 items of another service, the purges, and their sweep."""
    local, purges = LocalTier(1 << 20), InvalidationLog(None, "test", 1.0)
    fill(local, purges)
    return local, purges, PurgeSweep(local, purges, lambda: MODELS)


def fill(local, purges):
    for number in range(10):
        for digest, name in MODELS:
            local.put(purges.epochs.key(digest, name, bytes([number]) * 16), Entry(b"answer", 100))
        local.put(purges.epochs.own_key("shop", "", bytes([number])), Entry(b"item", 100))


def held(local, purges, digest, name):
    return sum(local.peek(purges.epochs.key(digest, name, bytes([number]) * 16)) is not None for number in range(10))


async def test_a_purged_model_takes_no_memory(parts):
    local, purges, sweep = parts
    before = local.counters.bytes
    await purges.purge([model_scope("a")])
    await sweep.sweep()
    assert local.counters.entries == 20
    assert local.counters.bytes < before
    assert held(local, purges, B, "b") == 10
    assert local.counters.evictions == 0


async def test_what_was_computed_since_the_purge_stays(parts):
    local, purges, sweep = parts
    await purges.purge([model_scope("a")])
    fill(local, purges)
    await sweep.sweep()
    assert held(local, purges, A, "a") == held(local, purges, B, "b") == 10


async def test_a_purge_of_everything_leaves_nothing_behind(parts):
    local, purges, sweep = parts
    await purges.purge([EVERYTHING])
    await sweep.sweep()
    assert (local.counters.entries, local.counters.bytes) == (0, 0)


async def test_a_purge_of_a_tenant_removes_no_answers_of_others(parts):
    local, purges, sweep = parts
    await purges.purge([tenant_scope("acme")])
    await sweep.sweep()
    assert local.counters.entries == 30


async def test_the_sweep_follows_purges_while_it_runs(parts):
    local, purges, sweep = parts
    task = asyncio.create_task(sweep.keep_sweeping())
    async with asyncio.timeout(60):
        for scope, left in ((model_scope("a"), 20), (model_scope("b"), 10), (EVERYTHING, 0)):
            await purges.purge([scope])
            while local.counters.entries != left:
                await asyncio.sleep(0)
    task.cancel()
