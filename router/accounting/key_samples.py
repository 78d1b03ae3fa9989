"""Counts the requests for a sample of the keys, from which the ledger predicts what caches of other sizes would hit.

SHARDS (Waldspurger et al., FAST '15): a key is sampled if its hash is below a threshold, so either all requests for it
are or none. Where many keys come, the threshold falls: what is below it now was below the one before, too.
"""

from __future__ import annotations  # compiled by mypyc

from typing import Final, TypeAlias

from cache.tiers.entry import Entry

# A key is sampled if its first byte is below this.
_FIRST_BELOW: Final = 16
# Of keys that are reported at a time, about once a second.
_MOST: Final = 1024
_KEY_BYTES: Final = 8

# Model, version, worker type, whether the answer is cacheable, and the first bytes of the request's hash.
SampledKey: TypeAlias = tuple[str, str, str, bool, bytes]


class Seen:
    """Requests for a key: the time of the first, and what its answer took to compute and has in bytes."""

    __slots__ = ("at_ms", "compute_us", "requests", "value_bytes")

    def __init__(self, at_ms: int, entry: Entry) -> None:
        self.at_ms = at_ms
        self.requests = 0
        self.compute_us = entry.compute_us
        self.value_bytes = len(entry.value)


class KeySamples:
    """Keys whose first byte is less than `below` are to be added."""

    def __init__(self) -> None:
        self.below = _FIRST_BELOW
        self._seen: dict[SampledKey, Seen] = {}

    def add(
        self, model: str, version: str, worker_type: str, key: bytes, entry: Entry, at_ms: int, *, cacheable: bool
    ) -> None:
        """Counts a request."""
        name = (model, version, worker_type, cacheable, key[:_KEY_BYTES])
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = Seen(at_ms, entry)
        seen.requests += 1

    def take(self) -> tuple[dict[SampledKey, Seen], int]:
        """At most about _MOST of what was added since the last call, and the threshold that its keys are below.

        Adjusts the threshold for what comes.
        """
        taken, self._seen = self._seen, {}
        below = self.below
        while len(taken) > _MOST and below > 1:
            below //= 2
            taken = {name: seen for name, seen in taken.items() if name[4][0] < below}
        self.below = min(2 * below, _FIRST_BELOW) if len(taken) < _MOST // 4 else below
        return taken, below
