"""Cost check: whether to look up an answer in another tier (Redis, a peer region) before or while it is computed.

A look-up costs a round trip and, on a miss, the write of the computed answer. A hit saves the computation. All of this
is measured: hits by subject (a model and a class of its requests), times by the caller. If the saving is close to the
cost, the look-up runs in parallel with the computation, which adds no latency.

A tier that is not asked is not written to either, so its hit ratio could never recover. Therefore a small share of the
keys is always looked up and written. The key decides: all processes of a fleet choose the same keys without
coordination, and the hit ratio of these keys equals that of all keys.
"""

from __future__ import annotations

from typing import Final

from services.runtime.telemetry.recent import Recent

_MAX_SUBJECTS = 4096
# A tier is not asked below the first ratio of saving to cost, and is waited for from the second one on.
_NOT_WORTH = 1 / 3
_WORTH = 2.0
# The hit ratio covers about the last _MEMORY look-ups. It starts as if _ASSUMED look-ups had half hits.
_MEMORY = 256.0
_ASSUMED = 8.0
# One key in this many is explored.
_EXPLORED = 64


class Decision:
    """Result of a cost check. `asks`: look the key up, and write the computed answer. `waits`: compute only on a miss.

    `reason` explains the decision to a person.
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
    """Makes the cost checks of one tier, from its hit ratio by subject."""

    def __init__(self) -> None:
        self._known: Recent[bytes, _Hits] = Recent(_MAX_SUBJECTS)

    def decide(
        self, subject: bytes, key: bytes, compute_seconds: float | None, trip_seconds: float, write_seconds: float = 0.0
    ) -> Decision:
        """Decides for one request. `compute_seconds` includes queueing; None: unknown. `trip_seconds` may be inf."""
        if compute_seconds is None:
            return UNKNOWN
        share = self.share(subject)
        saving = share * compute_seconds
        cost = trip_seconds + (1.0 - share) * write_seconds
        if saving >= _WORTH * cost:
            return WORTH
        if saving >= _NOT_WORTH * cost:
            return CLOSE
        # The end of a key is uniformly distributed, because it is part of a hash.
        return EXPLORED if int.from_bytes(key[-4:], "big") % _EXPLORED == 0 else NOT_WORTH

    def learn(self, subject: bytes, *, hit: bool) -> None:
        """Records the result of a look-up. Do not record failed look-ups."""
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
        """The hit ratio; 0.5 for an unknown subject."""
        known = self._known.get(subject)
        return 0.5 if known is None else known.hits / known.look_ups
