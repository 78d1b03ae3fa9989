"""Cost check: whether to look up an answer in another tier (Redis, a peer region) before or while it is computed.

A look-up costs a round trip and, on a miss, the write of the computed answer. A hit saves the computation. All of this
is measured: hits by subject, times by the caller. If the saving is close to the cost, the look-up runs in parallel with
the computation, which adds no latency.

A tier that is not asked is not written to either, so its hit ratio could never recover. Therefore a small share of the
keys is always looked up and written. The key decides: all processes of a fleet choose the same keys without
coordination, and the hit ratio of these keys equals that of all keys.
"""

from __future__ import annotations  # compiled by mypyc

from typing import Final, Literal, TypeAlias

from services.runtime.telemetry.recent import Recent

_MAX_SUBJECTS = 4096
# A tier is not asked below the first ratio of saving to cost, and is waited for from the second one on.
_NOT_WORTH = 1 / 3
_WORTH = 2.0
# The hit ratio covers about the last _MEMORY look-ups. It starts as if _ASSUMED look-ups had half hits.
_MEMORY = 256.0
_ASSUMED = 8.0
# The hit ratio counts as at least this: a process that restarts, or a new one, finds more than past look-ups show.
_LEAST_SHARE = 0.01
# One key in this many is explored.
_EXPLORED = 64

Use: TypeAlias = Literal["first", "concurrent", "explored", "skipped"]


class Subject:
    """What is decided alike: the requests of a similar size for one model version.

    `policy`: "always" or "never" if the model's configuration decides, else "".
    """

    __slots__ = ("id", "model", "policy")

    def __init__(self, model: str, digest: bytes, request_bytes: int, policy: str = "") -> None:
        self.id = digest + bytes((request_bytes.bit_length(),))
        self.model = model
        self.policy = policy


class LookUpDecision:
    """Result of a cost check. `asks`: look the key up, and write the computed answer. `waits`: compute only on a miss.

    `use` is its name in metrics; `reason` explains it to a person.
    """

    __slots__ = ("asks", "reason", "use", "waits")

    def __init__(self, use: Use, reason: str) -> None:
        self.use = use
        self.reason = reason
        self.asks = use != "skipped"
        self.waits = use == "first"


NO_TIER: Final = LookUpDecision("skipped", "")
ALWAYS: Final = LookUpDecision("first", "looked up first: the model's configuration says so")
FOR_REGIONS: Final = LookUpDecision("first", "looked up first: other regions read what Redis holds")
NEVER: Final = LookUpDecision("skipped", "not looked up: the model's configuration says so")
UNKNOWN: Final = LookUpDecision("first", "looked up first: what computing takes is not known yet")
WORTH: Final = LookUpDecision("first", "looked up first: hits save more than look-ups and writes cost")
CLOSE: Final = LookUpDecision("concurrent", "looked up while computing: hits save about what look-ups and writes cost")
EXPLORED: Final = LookUpDecision(
    "explored", "looked up while computing: one of the keys that show how many hits there are"
)
NOT_WORTH: Final = LookUpDecision("skipped", "not looked up: hits save less than look-ups and writes cost")


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
    ) -> LookUpDecision:
        """Decides for one request. `compute_seconds` includes queueing; None: unknown. `trip_seconds` may be inf.

        `subject` is the id of a Subject.
        """
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
        return 0.5 if known is None else max(_LEAST_SHARE, known.hits / known.look_ups)
