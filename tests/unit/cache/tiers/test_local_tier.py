import gc
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.entry import Entry
from cache.tiers.local_tier import _MOST_EVICTED, LocalTier, _size

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"ea", b"fa", b"ga"])
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("put"), KEYS, st.integers(0, 900), st.integers(0, 10_000)),
    ),
    max_size=80,
)


def filled(capacity, count, size=600, cost=1000):
    tier = LocalTier(capacity)
    for index in range(count):
        tier.put(b"%d" % index, Entry(bytes(size), cost))
    return tier


def held(tier, keys):
    return [key for key in keys if tier.get(key) is not None]


@given(st.integers(0, 30_000), CALLS)
def test_it_never_holds_more_than_its_capacity_nor_anything_but_what_was_put_last(capacity, calls):
    tier, last = LocalTier(capacity), {}
    for call, key, *rest in calls:
        if call == "put":
            size, cost = rest
            last[key] = Entry(os.urandom(size), cost)
            tier.put(key, last[key])
        else:
            assert tier.get(key) in (None, last.get(key))
        found = {key: entry for shard in tier._shards for key, entry in shard.items()}
        assert tier.counters.bytes == sum(_size(key, entry) for key, entry in found.items()) <= capacity
        assert tier.counters.entries == len(found)


def test_with_room_for_all_nothing_is_evicted():
    tier = filled(1 << 20, 500)
    assert len(held(tier, [b"%d" % index for index in range(500)])) == 500
    assert tier.counters.evictions == 0


def test_what_was_expensive_for_its_size_stays():
    tier = LocalTier(100_000)
    tier.put(b"expensive", Entry(bytes(600), 50_000))
    tier.put(b"expensive but large", Entry(bytes(5_000), 50_000))
    tier.put(b"cheap", Entry(bytes(600), 100))
    for index in range(300):
        tier.put(b"%d" % index, Entry(bytes(600), 10_000))
    assert held(tier, [b"expensive", b"expensive but large", b"cheap"]) == [b"expensive"]


def test_what_is_asked_for_stays_among_its_equals():
    tier = LocalTier(100_000)
    for index in range(1000):
        tier.put(b"%d" % index, Entry(bytes(600), 1000))
        tier.get(b"7")
    assert held(tier, [b"6", b"7", b"8"]) == [b"7"]


def test_what_is_no_longer_asked_for_goes_in_the_end():
    tier = filled(100_000, 50)
    for _ in range(10):
        tier.get(b"7")
    for index in range(1000, 3000):
        tier.put(b"%d" % index, Entry(bytes(600), 1000))
    assert not held(tier, [b"7"])


def test_a_scan_leaves_what_is_asked_for_again_and_again():
    popular = [b"p%d" % index for index in range(50)]
    tier = LocalTier(100_000)
    for key in popular:
        tier.put(key, Entry(bytes(600), 1000))
        tier.get(key)
    for index in range(3000):
        tier.put(b"%d" % index, Entry(bytes(600), 1000))
        if index % 10 == 0:
            held(tier, popular)
    assert held(tier, popular) == popular


@pytest.mark.parametrize("old", [False, True])
def test_an_entry_larger_than_a_sixteenth_is_not_kept_and_neither_is_the_one_it_replaces(old):
    tier = filled(160_000, 10)
    if old:
        tier.put(b"large", Entry(b"old", 1))
    tier.put(b"large", Entry(bytes(10_000), 1_000_000))
    assert tier.get(b"large") is None
    assert tier.counters.entries == 10
    assert tier.counters.evictions == 0


def test_no_call_evicts_more_than_a_few_even_for_a_large_entry():
    tier = filled(16 << 20, 20_000)
    for index in range(100):
        before = tier.counters.evictions
        tier.put(b"large %d" % index, Entry(bytes(1_000_000), 100_000_000))
        assert tier.counters.evictions - before <= _MOST_EVICTED
        assert tier.counters.bytes <= 16 << 20
    assert held(tier, [b"large %d" % index for index in range(100)])


def test_an_entry_put_again_and_again_takes_no_more_room_and_keeps_its_worth():
    tier = filled(100_000, 60)
    for _ in range(20):
        tier.get(b"7")
    once = tier.counters.bytes
    for _ in range(1000):
        tier.put(b"7", Entry(bytes(600), 1000))
    assert tier.counters.bytes == once
    assert len(tier._heap) == 60
    for index in range(1000, 1200):
        tier.put(b"%d" % index, Entry(bytes(600), 1000))
    assert held(tier, [b"6", b"7"]) == [b"7"]


def test_hits_count_the_compute_time_they_saved():
    tier = LocalTier(100_000)
    tier.put(b"a", Entry(b"x", 700))
    tier.get(b"a")
    tier.get(b"a")
    tier.get(b"b")
    assert (tier.counters.hits, tier.counters.misses, tier.counters.saved_compute_us) == (2, 1, 1400)


@pytest.mark.parametrize("size", [40, 10_000])
def test_entries_are_counted_with_what_they_really_take(size):
    tier = LocalTier(1 << 40)
    gc.collect()
    tracemalloc.start()
    try:
        for index in range(20_000_000 // (size + 1000)):
            key = os.urandom(32)
            tier.put(key, Entry(os.urandom(size), 100_000 + index, 1_700_000_000_000 + index))
            tier.get(key)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken <= tier.counters.bytes <= 1.15 * taken
