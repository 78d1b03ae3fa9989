"""Whether another tier (Redis, a peer region) is worth asking before, or while, an answer is computed.

Asking costs the trip, and on a miss the write of what is computed; it saves the computing where there is a hit. All of
it is measured: hits by subject (a model and a class of its requests), times by the caller. Where the saving is about
the cost, the tier is asked while computing goes on, which costs no time.

A tier that is not asked is not written to either, so that hits could never be seen again. So a small share of the keys
is asked for and written all the same. It is chosen by the key: the processes of a fleet, without knowing of each other,
write and ask for the same keys, and the share of hits among them is that of all.
"""

from __future__ import annotations

from typing import Final

from services.runtime.telemetry.recent import Recent

_MAX_SUBJECTS = 4096
# Below and above these ratios of saving to cost, it is clear what to do.
_NOT_WORTH = 1 / 3
_WORTH = 2.0
# The share of hits is of about so many of the last look-ups, and of so many before the first, half of them hits.
_MEMORY = 256.0
_ASSUMED = 8.0
# One key of so many is explored.
_EXPLORED = 64


class Decision:
    """`asks`: look it up, and write what is computed. `waits`: compute only where it is not found.

    `reason` says why, for people.
    """

    __slots__ = ("asks", "reason", "waits")

    def __init__(self, reason: str, *, asks: bool, waits: bool) -> None:
        self.reason = reason
        self.asks = asks
        self.waits = waits


WORTH: Final = Decision("worth asking", asks=True, waits=True)
CLOSE: Final = Decision("asked while computing: it saves about what it costs", asks=True, waits=False)
UNKNOWN: Final = Decision("asked while computing: what computing takes is not known yet", asks=True, waits=False)
EXPLORED: Final = Decision(
    "asked while computing: one of the keys that show how many hits there are", asks=True, waits=False
)
NOT_WORTH: Final = Decision("not worth asking", asks=False, waits=False)


class _Hits:
    __slots__ = ("hits", "look_ups")

    def __init__(self) -> None:
        self.hits = _ASSUMED / 2
        self.look_ups = _ASSUMED


class WorthAsking:
    """What one tier is worth, by subject."""

    def __init__(self) -> None:
        self._known: Recent[bytes, _Hits] = Recent(_MAX_SUBJECTS)

    def decide(
        self, subject: bytes, key: bytes, compute_seconds: float | None, trip_seconds: float, write_seconds: float = 0.0
    ) -> Decision:
        """Of one request. `compute_seconds` include the queue; None: not known. `trip_seconds` may be infinite."""
        if compute_seconds is None:
            return UNKNOWN
        share = self.share(subject)
        saving = share * compute_seconds
        cost = trip_seconds + (1.0 - share) * write_seconds
        if saving >= _WORTH * cost:
            return WORTH
        if saving >= _NOT_WORTH * cost:
            return CLOSE
        # Keys end as hashes do.
        return EXPLORED if int.from_bytes(key[-4:], "big") % _EXPLORED == 0 else NOT_WORTH

    def learn(self, subject: bytes, *, hit: bool) -> None:
        """What came of a look-up; one that failed says nothing."""
        known = self._known.get(subject)
        if known is None:
            known = _Hits()
            self._known.put(subject, known)
        if known.look_ups >= _MEMORY:
            known.hits *= 1.0 - 1.0 / _MEMORY
            known.look_ups *= 1.0 - 1.0 / _MEMORY
        known.look_ups += 1.0
        known.hits += hit

    def share(self, subject: bytes) -> float:
        """Of hits among look-ups; a half where nothing is known."""
        known = self._known.get(subject)
        return 0.5 if known is None else known.hits / known.look_ups
