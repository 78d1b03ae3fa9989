"""The tier in this process's memory: byte-bounded; what was expensive to compute, for its size, stays.

GreedyDual-Size-Frequency (Cherkasova, 1998): an entry is worth clock + hits * cost / size. The least worth is
evicted, and the clock goes on to what that was worth, so that what is no longer asked for ages. A hit only counts;
the heap is put right when the entry comes to its top. docs/decisions/0009 compares it with others.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from cache.tiers.entry import Entry
from cache.tiers.stats import TierCounters

# Measured with tracemalloc on CPython 3.11: dict slot, heap slot and tuple, Entry, its numbers, bytes headers.
# A compiled Entry holds its numbers unboxed.
_OVERHEAD_BYTES = 370 if __file__.endswith(".py") else 285
# A miss costs the fleet this much CPU even where computing is nothing: two calls, parsed and packed.
_TRIP_US = 200
# No call does more than a little: one dict would be rehashed at once, and a large entry may push out thousands.
_SHARDS = 256
_MOST_EVICTED = 16
_HEADROOM = 16
_MODEL_BYTES = 16
_MAX_MODELS = 4096
# Heap slots of entries that are gone are cleared out once they outnumber the entries, and this many.
_MIN_STALE_SLOTS = 1024


class LocalTier:
    """Entries by key, at most `capacity_bytes` of them with keys and overhead.

    Changed on one thread, the event loop's; `get` and `peek` may be called beside it.

    A sixteenth of it is room for what came faster than evictions, of which a call makes a few; so an entry larger than
    that is not kept.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._largest = capacity_bytes // _HEADROOM
        self._shards: list[dict[bytes, Entry]] = [{} for _ in range(_SHARDS)]
        self._heap: list[tuple[float, bytes]] = []
        self._clock = 0.0
        self._evicted: dict[bytes, int] = {}
        self.counters = TierCounters("local")

    def get(self, key: bytes) -> Entry | None:
        """The entry, worth more now; None on a miss."""
        entry = self._shards[key[-1]].get(key)
        if entry is None:
            self.counters.misses += 1
            return None
        entry.hits += 1
        self.counters.hits += 1
        self.counters.saved_compute_us += entry.compute_us
        return entry

    def peek(self, key: bytes) -> Entry | None:
        """As `get`, and counts nothing."""
        return self._shards[key[-1]].get(key)

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self._capacity

    def shards(self) -> Iterator[list[tuple[bytes, Entry]]]:
        """All that is held, in parts short enough to walk between two requests."""
        for shard in self._shards:
            yield list(shard.items())

    def take_evicted(self) -> dict[bytes, int]:
        """How many entries made room since this was asked last, by how their keys begin; b"" for very many models."""
        evicted, self._evicted = self._evicted, {}
        return evicted

    def put(self, key: bytes, entry: Entry) -> None:
        """Keeps the entry, in place of one of the same key, unless it is too large or at once the one worth least."""
        size = _size(key, entry)
        shard = self._shards[key[-1]]
        counters = self.counters
        old = shard.get(key)
        if size > self._largest:
            if old is not None:
                self._drop(shard, key, old)
            return
        shard[key] = entry
        if old is not None:
            counters.bytes += size - _size(key, old)
            entry.hits, entry.weighed_hits, entry.worth = old.hits, old.weighed_hits, old.worth
        else:
            counters.bytes += size
            counters.entries += 1
            if len(self._heap) > 2 * counters.entries + _MIN_STALE_SLOTS:
                self._clear_stale_slots()
            self._push(key, entry, size)
        counters.fills += 1
        self._evict()
        if counters.bytes > self._capacity and shard.get(key) is entry:
            self._drop(shard, key, entry)

    def _push(self, key: bytes, entry: Entry, size: int) -> None:
        entry.weighed_hits = entry.hits
        entry.worth = self._clock + (1 + entry.hits) * (entry.compute_us + _TRIP_US) / size
        heappush(self._heap, (entry.worth, key))

    def _evict(self) -> None:
        """A step towards having the headroom free."""
        heap = self._heap
        target = self._capacity - self._largest
        for _ in range(_MOST_EVICTED):
            if self.counters.bytes <= target or not heap:
                return
            worth, key = heappop(heap)
            shard = self._shards[key[-1]]
            entry = shard.get(key)
            if entry is None or entry.worth != worth:
                continue  # a slot of an entry that was dropped
            self._clock = max(self._clock, worth)
            if entry.hits != entry.weighed_hits:
                self._push(key, entry, _size(key, entry))
            else:
                self._drop(shard, key, entry)
                self.counters.evictions += 1
                prefix = key[:_MODEL_BYTES]
                if prefix not in self._evicted and len(self._evicted) >= _MAX_MODELS:
                    prefix = b""
                self._evicted[prefix] = self._evicted.get(prefix, 0) + 1

    def _clear_stale_slots(self) -> None:
        slots = {(worth, key) for worth, key in self._heap if self._is_current(worth, key)}
        self._heap = list(slots)
        heapify(self._heap)

    def _is_current(self, worth: float, key: bytes) -> bool:
        entry = self._shards[key[-1]].get(key)
        return entry is not None and entry.worth == worth

    def _drop(self, shard: dict[bytes, Entry], key: bytes, entry: Entry) -> None:
        del shard[key]
        self.counters.bytes -= _size(key, entry)
        self.counters.entries -= 1


def _size(key: bytes, entry: Entry) -> int:
    return len(key) + len(entry.value) + _OVERHEAD_BYTES
