import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.entry import Entry
from cache.local_tier import LocalTier


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2000)), max_size=60))
def test_it_never_holds_more_than_its_capacity(puts):
    tier = LocalTier(5000)
    for name, size in puts:
        tier.put(b"%d" % name, Entry(bytes(size), 1))
        assert 0 <= tier.counters.bytes <= 5000


def test_the_least_recently_used_goes_first():
    tier = LocalTier(3 * 1500)
    for key in (b"a", b"b", b"c"):
        tier.put(key, Entry(bytes(1000), 1))
    tier.get(b"a")
    tier.put(b"d", Entry(bytes(1000), 1))
    assert [key for key in (b"a", b"b", b"c", b"d") if tier.get(key)] == [b"a", b"c", b"d"]
    assert tier.counters.evictions == 1


def test_an_entry_larger_than_the_tier_is_not_kept_and_evicts_nothing():
    tier = LocalTier(2000)
    tier.put(b"small", Entry(b"x", 1))
    tier.put(b"large", Entry(bytes(3000), 1))
    assert tier.get(b"large") is None
    assert tier.get(b"small") is not None


def test_an_entry_put_again_is_counted_once():
    tier = LocalTier(10_000)
    tier.put(b"a", Entry(bytes(10), 1))
    once = tier.counters.bytes
    tier.put(b"a", Entry(bytes(10), 1))
    assert tier.counters.bytes == once
    assert tier.counters.entries == 1


def test_hits_count_the_compute_time_they_saved():
    tier = LocalTier(10_000)
    tier.put(b"a", Entry(b"x", 700))
    tier.get(b"a")
    tier.get(b"a")
    tier.get(b"b")
    assert (tier.counters.hits, tier.counters.misses, tier.counters.saved_compute_us) == (2, 1, 1400)


@pytest.mark.parametrize("size", [100, 10_000])
def test_an_entry_is_counted_with_no_less_than_its_objects_take(size):
    tier = LocalTier(1 << 20)
    key, entry = bytes(32), Entry(bytes(size), 1_000_000, 1_700_000_000_000)
    tier.put(key, entry)
    objects = (key, entry, entry.value, entry.compute_us, entry.created_at_ms)
    assert tier.counters.bytes >= sum(map(sys.getsizeof, objects))
