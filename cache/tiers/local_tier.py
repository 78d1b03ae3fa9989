"""The tier in this process's memory: bounded in bytes, keeps entries with a high compute cost per byte.

GreedyDual-Size-Frequency (Cherkasova, 1998): the worth of an entry is clock + hits * cost / size. The entry with the
lowest worth is evicted, and the clock advances to that worth, so that unused entries age. A hit only increments a
counter; the heap is corrected when the entry reaches its top. docs/decisions/0009 compares it with other policies.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from cache.tiers.entry import Entry
from cache.tiers.stats import TierCounters

# Measured with tracemalloc on CPython 3.11: dict slot, heap slot and tuple, Entry, its numbers, bytes headers.
# A compiled Entry stores its numbers unboxed.
_OVERHEAD_BYTES = 370 if __file__.endswith(".py") else 285
# CPU time that a miss costs the fleet even if computing is free: parsing and serializing two calls.
_TRIP_US = 200
# These bound the work of one call: a single dict would rehash in one step, and a large entry can evict thousands.
_SHARDS = 256
_MOST_EVICTED = 16
_HEADROOM = 16
# Length of the prefix of a key that stands for the model version.
MODEL_BYTES = 16
_MAX_MODELS = 4096
# Heap slots of dropped entries are removed once they outnumber the entries by this many.
_MIN_STALE_SLOTS = 1024


class LocalTier:
    """Entries by key, at most `capacity_bytes` including keys and overhead.

    A sixteenth of the capacity is headroom for entries that arrive faster than they are evicted, because each call
    evicts only a few. An entry larger than the headroom is not stored.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity = capacity_bytes
        self._largest = capacity_bytes // _HEADROOM
        self._shards: list[dict[bytes, Entry]] = [{} for _ in range(_SHARDS)]
        self._heap: list[tuple[float, bytes]] = []
        self._clock = 0.0
        self._evicted: dict[bytes, int] = {}
        self.counters = TierCounters("local")

    def get(self, key: bytes) -> Entry | None:
        """Returns the entry and counts the hit, or returns None on a miss."""
        entry = self._shards[key[-1]].get(key)
        if entry is None:
            self.counters.misses += 1
            return None
        entry.hits += 1
        self.counters.hits += 1
        self.counters.saved_compute_us += entry.compute_us
        return entry

    def peek(self, key: bytes) -> Entry | None:
        return self._shards[key[-1]].get(key)

    def shards(self) -> Iterator[list[tuple[bytes, Entry]]]:
        """Yields all entries, in parts that are short enough to process between two requests."""
        for shard in self._shards:
            yield list(shard.items())

    def take_evicted(self) -> dict[bytes, int]:
        """Returns and resets the number of evictions by key prefix; b"" collects those beyond _MAX_MODELS prefixes."""
        evicted, self._evicted = self._evicted, {}
        return evicted

    def put(self, key: bytes, entry: Entry) -> None:
        """Stores the entry, and replaces one with the same key, unless it is too large or the tier has no room left."""
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
        if counters.bytes > self.capacity and shard.get(key) is entry:
            self._drop(shard, key, entry)

    def remove(self, key: bytes) -> None:
        """Removes the entry, if there is one. It does not count as evicted."""
        shard = self._shards[key[-1]]
        entry = shard.get(key)
        if entry is not None:
            self._drop(shard, key, entry)

    def _push(self, key: bytes, entry: Entry, size: int) -> None:
        entry.weighed_hits = entry.hits
        entry.worth = self._clock + (1 + entry.hits) * (entry.compute_us + _TRIP_US) / size
        heappush(self._heap, (entry.worth, key))

    def _evict(self) -> None:
        """Evicts up to _MOST_EVICTED entries, until the headroom is free."""
        heap = self._heap
        target = self.capacity - self._largest
        for _ in range(_MOST_EVICTED):
            if self.counters.bytes <= target or not heap:
                return
            worth, key = heappop(heap)
            shard = self._shards[key[-1]]
            entry = shard.get(key)
            if entry is None or entry.worth != worth:
                continue  # the slot of a dropped or updated entry
            self._clock = max(self._clock, worth)
            if entry.hits != entry.weighed_hits:
                self._push(key, entry, _size(key, entry))
            else:
                self._drop(shard, key, entry)
                self.counters.evictions += 1
                prefix = key[:MODEL_BYTES]
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
