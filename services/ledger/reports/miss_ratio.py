"""How many bytes a least-recently-used cache needs for each look-up to be a hit, from a sample of the keys.

SHARDS (Waldspurger et al., FAST '15): among the keys whose hash is below a threshold, the bytes that were looked up
since the last look-up of a key are, divided by the share of the hashes below it, those among all keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

_LEAST_KEYS = 32


class LookUp(NamedTuple):
    """Look-ups of a key, `times` of them right after each other.

    `size` is what its answer has in bytes, `value` what a hit saves.
    """

    key: object
    size: int
    times: int = 1
    value: int = 0


class Curve:
    """Hits, and what they save, by the size of the cache. `share` of the keys, 0 to 1, are in `sampled`.

    `look_ups` is how many there were of all keys, if that is known. Keys that are looked up most are in a sample or
    not, and are hits in any cache: so what the sample has too few or too many of counts as hits (SHARDS-adj).
    """

    def __init__(self, sampled: Sequence[LookUp], share: float = 1.0, look_ups: int | None = None) -> None:
        found: list[tuple[float, int, int]] = []
        for look_up, between in zip(sampled, _bytes_between(sampled), strict=True):
            # The first of them waited for the one before; the others find what it left.
            if between is not None:
                found.append((between / share + look_up.size, 1, look_up.value))
            if look_up.times > 1:
                found.append((look_up.size, look_up.times - 1, (look_up.times - 1) * look_up.value))
        found.sort()
        self._needed = [needed for needed, _, _ in found]
        self._hits = [0, *accumulate(hits for _, hits, _ in found)]
        self._values = [0, *accumulate(value for _, _, value in found)]
        self._share = share
        self._sampled = sum(look_up.times for look_up in sampled)
        self.look_ups = round(self._sampled / share) if look_ups is None else look_ups
        sizes = {look_up.key: look_up.size for look_up in sampled}
        # Of all keys, in a cache without a bound.
        self.bytes = round(sum(sizes.values()) / share)
        # Of smaller caches the sample has too few keys to tell.
        self.least_bytes = round(_LEAST_KEYS * (1 / share - 1) * sum(sizes.values()) / max(len(sizes), 1))

    def hits(self, capacity: int) -> float:
        """Of a cache of `capacity` bytes."""
        hits = self._hits[bisect_right(self._needed, capacity)]
        return min(max(self.look_ups - (self._sampled - hits) / self._share, 0.0), self.look_ups) if hits else 0.0

    def hit_ratio(self, capacity: int) -> float:
        return self.hits(capacity) / self.look_ups if self.look_ups else 0.0

    def value(self, capacity: int) -> int:
        place = bisect_right(self._needed, capacity)
        return round(self._values[place] * self.hits(capacity) / self._hits[place]) if self._hits[place] else 0


def _bytes_between(sampled: Sequence[LookUp]) -> Iterator[int | None]:
    """Bytes of the other keys that were looked up since the last look-up of the same key; None of a first one.

    A Fenwick tree over the look-ups holds the size of each key at its last one.
    """
    tree = [0] * (len(sampled) + 1)

    def add(place: int, size: int) -> None:
        while place < len(tree):
            tree[place] += size
            place += place & -place

    def until(place: int) -> int:
        total = 0
        while place:
            total += tree[place]
            place -= place & -place
        return total

    last: dict[object, tuple[int, int]] = {}
    total = 0
    for place, look_up in enumerate(sampled, start=1):
        before, size = last.get(look_up.key, (0, 0))
        if before:
            yield total - until(before)
            add(before, -size)
        else:
            yield None
        add(place, look_up.size)
        total += look_up.size - size
        last[look_up.key] = place, look_up.size
