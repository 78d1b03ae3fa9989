"""The miss-ratio curve: exact where all keys are in it, near where a sample is, on a public trace too."""

import importlib
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.miss_ratio import Curve, LookUp
from tests.public_trace import public_trace

SIZE = 1000
SHARE = 1 / 16
LIBCACHESIM = Path(sys.prefix) / "libcachesim"


class LeastRecentlyUsed:
    """A cache as one writes it down."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.sizes = OrderedDict()
        self.hits = self.value = 0

    def get(self, look_up):
        for _ in range(look_up.times):
            if look_up.key in self.sizes:
                self.hits += 1
                self.value += look_up.value
                self.sizes.move_to_end(look_up.key)
            self.sizes[look_up.key] = look_up.size
            while sum(self.sizes.values()) > self.capacity:
                self.sizes.popitem(last=False)


def look_ups(size):
    one = st.builds(LookUp, st.integers(0, 12), size, st.integers(1, 3), st.integers(0, 50))
    # A key has one size.
    return st.lists(one, max_size=80).map(
        lambda found: [one._replace(size={other.key: other.size for other in found}[one.key]) for one in found]
    )


@given(look_ups(st.just(10)), st.integers(1, 15))
def test_of_all_keys_it_is_what_a_simulated_cache_hits(sampled, entries):
    cache = LeastRecentlyUsed(10 * entries)
    for look_up in sampled:
        cache.get(look_up)
    curve = Curve(sampled)
    assert curve.hits(cache.capacity) == cache.hits
    assert curve.value(cache.capacity) == cache.value


@given(look_ups(st.integers(1, 20)), st.integers(20, 300))
def test_answers_of_different_sizes_count_by_their_bytes(sampled, capacity):
    cache = LeastRecentlyUsed(capacity)
    for look_up in sampled:
        cache.get(look_up)
    assert Curve(sampled).hits(capacity) == cache.hits


@given(look_ups(st.integers(1, 20)))
def test_larger_caches_hit_no_less(sampled):
    curve = Curve(sampled)
    hits = [curve.hits(capacity) for capacity in range(0, 400, 10)]
    assert hits == sorted(hits)
    assert curve.hits(curve.bytes) == curve.look_ups - len({look_up.key for look_up in sampled})


def test_nothing_was_looked_up():
    curve = Curve([])
    assert (curve.hit_ratio(100), curve.value(100), curve.bytes) == (0.0, 0, 0)


@pytest.mark.skipif(not LIBCACHESIM.exists(), reason="libCacheSim is not here: make .venv/libcachesim")
def test_on_a_public_trace_it_is_what_libcachesim_says(monkeypatch):
    monkeypatch.syspath_prepend(LIBCACHESIM)
    libcachesim = importlib.import_module("libcachesim")
    keys = [block for _, blocks in public_trace() for block in blocks]
    exact = Curve([LookUp(key, SIZE) for key in keys])
    is_sampled = {key: blake3(b"%d" % key).digest()[0] < 256 * SHARE for key in set(keys)}
    sampled = Curve([LookUp(key, SIZE) for key in keys if is_sampled[key]], SHARE, len(keys))
    request = libcachesim.Request()
    for entries in (1_000, 10_000, 50_000, 200_000):
        cache = libcachesim.LRU(entries * SIZE)
        hits = 0
        for key in keys:
            request.obj_id, request.obj_size = key, SIZE
            hits += cache.get(request)
        assert exact.hits(entries * SIZE) == hits
        assert sampled.hit_ratio(entries * SIZE) == pytest.approx(hits / len(keys), abs=0.025)
