"""Eviction policies to compare, over keys, sizes and costs; they store no values.

`get` says whether a key is held; `put` adds a computed key. Sources: SIEVE (Zhang et al., NSDI'24); S3-FIFO (Yang et
al., SOSP'23); W-TinyLFU (Einziger et al., 2017), with exact counts in place of a sketch; GDSF (Cherkasova, 1998), which
weighs by cost and size; Hyperbolic (Blankstein et al., ATC'17), the same weight sampled.
"""

import heapq
import random
from collections import OrderedDict, deque

from cache.tiers.entry import Entry
from cache.tiers.local_tier import _OVERHEAD_BYTES, LocalTier


class Lru:
    def __init__(self, capacity):
        self.capacity, self.used = capacity, 0
        self.entries = OrderedDict()

    def get(self, key):
        if key not in self.entries:
            return False
        self.entries.move_to_end(key)
        return True

    def put(self, key, size, cost):
        if size > self.capacity:
            return
        self.entries[key] = size
        self.used += size
        while self.used > self.capacity:
            self.used -= self.entries.popitem(last=False)[1]


class Sieve:
    """A queue that new keys enter at the head; a hand moves from the tail and spares each visited key once."""

    def __init__(self, capacity):
        self.capacity, self.used = capacity, 0
        self.nodes = {}  # key -> [size, visited, newer, older, key]
        self.head = self.tail = self.hand = None

    def get(self, key):
        node = self.nodes.get(key)
        if node is None:
            return False
        node[1] = True
        return True

    def put(self, key, size, cost):
        if size > self.capacity:
            return
        while self.used + size > self.capacity:
            self.evict()
        node = [size, False, None, self.head, key]
        if self.head is not None:
            self.head[2] = node
        self.head = node
        if self.tail is None:
            self.tail = node
        self.nodes[key] = node
        self.used += size

    def evict(self):
        node = self.hand or self.tail
        while node[1]:
            node[1] = False
            node = node[2] or self.tail
        self.hand = node[2]
        if node[2] is not None:
            node[2][3] = node[3]
        else:
            self.head = node[3]
        if node[3] is not None:
            node[3][2] = node[2]
        else:
            self.tail = node[2]
        del self.nodes[node[4]]
        self.used -= node[0]


class S3Fifo:
    """A tenth of the bytes holds new keys; a key requested again there, or soon after, moves to the main queue."""

    def __init__(self, capacity):
        self.capacity, self.small_capacity = capacity, capacity // 10
        self.small_used = self.main_used = 0
        self.small, self.main = deque(), deque()
        self.entries = {}  # key -> [size, frequency, in_main]
        self.ghosts = OrderedDict()
        self.ghost_bytes = 0

    def get(self, key):
        entry = self.entries.get(key)
        if entry is None:
            return False
        if entry[1] < 3:
            entry[1] += 1
        return True

    def put(self, key, size, cost):
        if size > self.capacity:
            return
        while self.small_used + self.main_used + size > self.capacity:
            if (self.small and self.small_used >= self.small_capacity) or not self.main:
                self.evict_small()
            else:
                self.evict_main()
        if key in self.ghosts:
            self.ghost_bytes -= self.ghosts.pop(key)
            self.into_main(key, [size, 0, True])
        else:
            self.entries[key] = [size, 0, False]
            self.small.append(key)
            self.small_used += size

    def into_main(self, key, entry):
        entry[1], entry[2] = 0, True
        self.entries[key] = entry
        self.main.append(key)
        self.main_used += entry[0]

    def evict_small(self):
        key = self.small.popleft()
        entry = self.entries[key]
        self.small_used -= entry[0]
        if entry[1] > 0:
            self.into_main(key, entry)
            return
        del self.entries[key]
        self.ghosts[key] = entry[0]
        self.ghost_bytes += entry[0]
        while self.ghost_bytes > self.capacity - self.small_capacity:
            self.ghost_bytes -= self.ghosts.popitem(last=False)[1]

    def evict_main(self):
        while True:
            key = self.main.popleft()
            entry = self.entries[key]
            if entry[1] > 0:
                entry[1] -= 1
                self.main.append(key)
                continue
            del self.entries[key]
            self.main_used -= entry[0]
            return


class WTinyLfu:
    """A window of 1 %; a key that leaves it enters the main segments only if it is more frequent than their victim."""

    def __init__(self, capacity):
        self.window_capacity = max(1, capacity // 100)
        self.main_capacity = capacity - self.window_capacity
        self.protected_capacity = self.main_capacity * 8 // 10
        self.window, self.probation, self.protected = OrderedDict(), OrderedDict(), OrderedDict()
        self.used = {id(self.window): 0, id(self.probation): 0, id(self.protected): 0}
        self.counts, self.seen = {}, 0

    def count(self, key):
        self.counts[key] = self.counts.get(key, 0) + 1
        self.seen += 1
        if self.seen > 10 * max(1000, len(self.window) + len(self.probation) + len(self.protected)):
            self.counts = {key: count // 2 for key, count in self.counts.items() if count > 1}
            self.seen //= 2

    def get(self, key):
        self.count(key)
        if key in self.window:
            self.window.move_to_end(key)
        elif key in self.protected:
            self.protected.move_to_end(key)
        elif key in self.probation:
            self.move(self.probation, self.protected, key)
            while self.used[id(self.protected)] > self.protected_capacity:
                self.move(self.protected, self.probation, next(iter(self.protected)))
        else:
            return False
        return True

    def move(self, source, target, key):
        size = source.pop(key)
        self.used[id(source)] -= size
        target[key] = size
        self.used[id(target)] += size

    def put(self, key, size, cost):
        if size > self.main_capacity:
            return
        self.window[key] = size
        self.used[id(self.window)] += size
        while self.used[id(self.window)] > self.window_capacity:
            self.admit(next(iter(self.window)))

    def main_used(self):
        return self.used[id(self.probation)] + self.used[id(self.protected)]

    def admit(self, candidate):
        size = self.window[candidate]
        wanted = self.worth(candidate, size)
        while self.main_used() + size > self.main_capacity:
            segment = self.probation or self.protected
            victim = next(iter(segment))
            if self.worth(victim, segment[victim]) >= wanted:
                self.used[id(self.window)] -= self.window.pop(candidate)
                return
            self.used[id(segment)] -= segment.pop(victim)
        self.move(self.window, self.probation, candidate)

    def worth(self, key, size):
        return self.counts.get(key, 0)


class WTinyLfuCost(WTinyLfu):
    """Compares the cost saved by a byte, not the frequency."""

    def __init__(self, capacity):
        super().__init__(capacity)
        self.costs = {}

    def put(self, key, size, cost):
        self.costs[key] = cost
        super().put(key, size, cost)

    def worth(self, key, size):
        return self.counts.get(key, 0) * self.costs.get(key, 0) / size


class Gdsf:
    """Evicts the lowest clock + frequency * cost / size, and sets the clock to it.

    A hit only increments the frequency; the heap is corrected when the entry reaches its top.
    """

    def __init__(self, capacity):
        self.capacity, self.used, self.clock = capacity, 0, 0.0
        self.entries = {}  # key -> [size, cost, frequency, frequency used in its priority]
        self.heap = []

    def get(self, key):
        entry = self.entries.get(key)
        if entry is None:
            return False
        entry[2] += 1
        return True

    def put(self, key, size, cost):
        if size > self.capacity:
            return
        while self.used + size > self.capacity:
            self.evict()
        self.entries[key] = [size, cost, 1, 0]
        self.used += size
        self.push(key)

    def push(self, key):
        entry = self.entries[key]
        entry[3] = entry[2]
        heapq.heappush(self.heap, (self.clock + entry[2] * entry[1] / entry[0], key))

    def evict(self):
        priority, key = heapq.heappop(self.heap)
        self.clock = max(self.clock, priority)
        if self.entries[key][2] != self.entries[key][3]:
            self.push(key)
        else:
            self.used -= self.entries.pop(key)[0]


class Production:
    """The local tier itself. Its overhead differs from the traces', so values are shortened by it."""

    def __init__(self, capacity):
        self.tier = LocalTier(capacity)

    def get(self, key):
        return self.tier.get(key.to_bytes(32, "big")) is not None

    def put(self, key, size, cost):
        size = max(0, size - 32 - _OVERHEAD_BYTES)
        self.tier.put(key.to_bytes(32, "big"), Entry(bytes(size), cost, 0))


class Hyperbolic:
    """Evicts, among 16 random keys, the one that saved the least cost a byte and time unit since it was added."""

    def __init__(self, capacity):
        self.capacity, self.used, self.now = capacity, 0, 0
        self.entries, self.keys = {}, []
        self.random = random.Random(0)

    def get(self, key):
        self.now += 1
        entry = self.entries.get(key)
        if entry is None:
            return False
        entry[2] += 1
        return True

    def put(self, key, size, cost):
        if size > self.capacity:
            return
        while self.used + size > self.capacity:
            self.evict()
        self.entries[key] = [size, cost, 1, self.now, len(self.keys)]
        self.keys.append(key)
        self.used += size

    def evict(self):
        drawn = self.random.choices(self.keys, k=16)
        entries = self.entries

        def worth(key):
            size, cost, frequency, since, _ = entries[key]
            return frequency * cost / (size * (self.now - since + 1))

        victim = min(drawn, key=worth)
        size, *_, place = entries.pop(victim)
        last = self.keys.pop()
        if last != victim:
            self.keys[place] = last
            entries[last][4] = place
        self.used -= size


POLICIES = {
    "LRU": Lru,
    "SIEVE": Sieve,
    "S3-FIFO": S3Fifo,
    "W-TinyLFU": WTinyLfu,
    "W-TinyLFU by cost": WTinyLfuCost,
    "Hyperbolic": Hyperbolic,
    "GDSF": Gdsf,
    "the local tier": Production,
}
