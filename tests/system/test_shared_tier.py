"""The shared tier on a real Valkey that is killed, frozen, restarted and fed damaged values."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames
from cache.tiers.shared_tier import SharedTier, stored_name
from tests.system.callers import eventually
from tests.valkeys import valkey_server

# Long enough for a busy machine.
BUDGET = 1.0
FRAMES = EntryFrames("secret")


@pytest.fixture
async def tier(valkey):
    tier = SharedTier(
        valkey.connection_url,
        FRAMES,
        ttl_seconds=60,
        budget_seconds=BUDGET,
        create_breaker=lambda: Breaker(time.monotonic, first_pause=0.05, longest_pause=0.2),
    )
    await tier.get(b"warm up")
    yield tier
    await tier.close()


async def put(tier, key, value=b"value"):
    tier.put(key, Entry(value, 7))

    async def written():
        entry = await tier.get(key)
        return entry is not None and entry.value == value

    await eventually(written)


async def test_what_was_put_is_found_with_its_cost(tier):
    await put(tier, b"a")
    entry = await tier.get(b"a")
    assert (entry.value, entry.compute_us) == (b"value", 7)
    assert await tier.get(b"b") is None


async def test_lookups_that_begin_together_leave_in_one_write(tier, valkey):
    async with Redis.from_url(valkey.connection_url) as redis:

        async def reads():
            return (await redis.info("stats"))["total_reads_processed"]

        before = await reads()
        counting = await reads() - before
        before = await reads()
        await asyncio.gather(*(tier.get(b"%d" % index) for index in range(100)))
        assert await reads() - before - counting == 1


async def test_an_entry_ends_with_its_time_to_live(tier, valkey):
    await put(tier, b"a")
    async with Redis.from_url(valkey.connection_url) as redis:
        (name,) = await redis.keys("rm1:*")
        assert 20 <= await redis.ttl(name) <= 66


async def test_a_damaged_value_is_a_miss(tier, valkey):
    frame = bytearray(FRAMES.pack(b"a", Entry(b"value", 1)))
    frame[-1] ^= 1
    async with Redis.from_url(valkey.connection_url) as redis:
        await redis.set(stored_name(b"a"), bytes(frame))
    failures = tier.counters.failures
    assert await tier.get(b"a") is None
    assert tier.counters.failures == failures + 1


async def test_a_forged_value_is_a_miss_and_counted_as_damaged(tier, valkey):
    async with Redis.from_url(valkey.connection_url) as redis:
        await redis.set(stored_name(b"a"), EntryFrames("a guess").pack(b"a", Entry(b"value", 1)))
    assert await tier.get(b"a") is None
    assert [(sample.labels, sample.value) for sample in tier.metrics.errors.samples()] == [(("damaged",), 1)]


async def test_an_authentic_value_that_is_no_answer_is_a_miss_where_an_answer_is_wanted(tier):
    await put(tier, b"a", b"\xff not a message")
    assert await tier.get_answer(b"a") is None
    assert [(sample.labels, sample.value) for sample in tier.metrics.errors.samples()] == [(("damaged",), 1)]
    await put(tier, b"b", b"")
    assert (await tier.get_answer(b"b")).value == b""


async def test_a_value_copied_under_another_key_is_a_miss(tier, valkey):
    async with Redis.from_url(valkey.connection_url) as redis:
        await redis.set(stored_name(b"b"), FRAMES.pack(b"a", Entry(b"value", 1)))
    assert await tier.get(b"b") is None


async def test_a_hung_server_costs_one_budget_then_nothing_and_is_used_again_when_it_wakes(tier, valkey):
    await put(tier, b"a")
    valkey._process.send_signal(19)  # SIGSTOP
    try:
        start = time.monotonic()
        assert await tier.get(b"a") is None
        first = time.monotonic() - start
        start = time.monotonic()
        assert [await tier.get(b"a") for _ in range(100)] == [None] * 100
        others = time.monotonic() - start
    finally:
        valkey._process.send_signal(18)  # SIGCONT
    assert first >= BUDGET * 0.9
    assert others < BUDGET * 50  # of a hundred look-ups

    async def found():
        return await tier.get(b"a") is not None

    await eventually(found)


async def test_a_dead_server_is_a_miss_and_is_used_again_when_it_is_back(tier, valkey):
    valkey._process.kill()
    valkey._process.wait()
    assert await tier.get(b"a") is None
    tier.put(b"a", Entry(b"lost", 1))

    async def usable():
        await tier.get(b"a")
        tier.put(b"a", Entry(b"kept", 1))
        return await tier.get(b"a") is not None

    with valkey_server(valkey.port):
        await eventually(usable)


async def test_a_server_that_refuses_writes_is_no_error(tier, valkey):
    async with Redis.from_url(valkey.connection_url) as redis:
        await redis.config_set("maxmemory", 1)
        failures = tier.counters.failures
        tier.put(b"a", Entry(b"value", 1))

        async def counted():
            return tier.counters.failures > failures

        await eventually(counted)
        await redis.config_set("maxmemory", 0)

    await put(tier, b"a")


async def test_what_redis_evicted_is_counted(tier, valkey):
    async with Redis.from_url(valkey.connection_url) as redis:
        used = (await redis.info("memory"))["used_memory"]
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        await redis.config_set("maxmemory", used + 100_000)
        for index in range(40):
            await redis.set(f"other {index}", bytes(10_000))
    tier.start()

    async def counted():
        return tier.counters.evictions > 0

    await eventually(counted)


async def test_a_cancelled_lookup_leaves_another_of_the_same_key_alone(tier):
    await put(tier, b"a")
    first = asyncio.create_task(tier.get(b"a"))
    second = asyncio.create_task(tier.get(b"a"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).value == b"value"


async def test_a_process_that_was_busy_finds_what_came_meanwhile(tier):
    await put(tier, b"a")
    look_up = asyncio.create_task(tier.get(b"a"))
    for _ in range(5):
        await asyncio.sleep(0)  # it has left
    time.sleep(1.5 * BUDGET)  # noqa: ASYNC251 - that is what is tested
    assert (await look_up).value == b"value"
    assert not tier.is_skipped
