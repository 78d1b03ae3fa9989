"""Use of the shared tier: whether a local miss is looked up in Redis and its answer written there, by measured cost."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterator

from cache.policy.worth_asking import ALWAYS, FOR_REGIONS, NEVER, LookUpDecision, Subject, WorthAsking
from services.runtime.telemetry.metrics import Counter, Family, Sample

DECISIONS = Family(
    "ringmesh_shared_tier_decisions_total",
    "counter",
    "local misses and renewals by the use of the shared tier: first (looked up before computing), concurrent "
    "(while computing), explored (while computing, to measure the hit ratio), skipped (neither looked up nor written)",
    ("model", "decision"),
)
_SMOOTHING = 0.1


class SharedUse:
    """Decides how the shared tier is used, by the hit ratio of a subject and the recent costs of trips and writes.

    A write costs the time that it takes on the event loop: nobody waits for its reply. `has_peers`: other regions read
    what this one has in Redis, so that answers are always written.
    """

    def __init__(self, *, has_peers: bool) -> None:
        self._has_peers = has_peers
        self._worth = WorthAsking()
        self._decisions = Counter(DECISIONS)
        self._trip_seconds = self._write_seconds = 0.0

    def decide(self, subject: Subject, key: bytes, compute_seconds: float | None) -> LookUpDecision:
        """Decides for one request, and counts it. `compute_seconds` is recent and includes queueing; None: unknown."""
        decision = self._decide(subject, key, compute_seconds)
        self._decisions.add(subject.model, decision.use)
        return decision

    def explain(self, subject: Subject, key: bytes, compute_seconds: float | None) -> str:
        """The decision for a request, and what was measured."""
        decision = self._decide(subject, key, compute_seconds)
        if compute_seconds is None:
            return decision.reason
        return (
            f"{decision.reason}; recently computing took {1e3 * compute_seconds:.3g} ms, a look-up "
            f"{1e3 * self._trip_seconds:.3g} ms, a write {1e3 * self._write_seconds:.3g} ms, and "
            f"the hit ratio counts as {self._worth.share(subject.id):.0%}"
        )

    def looked_up(self, subject: Subject, seconds: float, *, hit: bool) -> None:
        """Records a look-up that Redis answered."""
        self._trip_seconds += _SMOOTHING * (seconds - self._trip_seconds)
        self._worth.learn(subject.id, hit=hit)

    def wrote(self, seconds: float) -> None:
        """Records the duration of a write on the event loop."""
        self._write_seconds += _SMOOTHING * (seconds - self._write_seconds)

    def samples(self) -> Iterator[Sample]:
        """Yields the samples, for `Metrics.add`."""
        return self._decisions.samples()

    def _decide(self, subject: Subject, key: bytes, compute_seconds: float | None) -> LookUpDecision:
        if subject.policy == "never":
            return NEVER
        if subject.policy == "always":
            return ALWAYS
        if self._has_peers:
            return FOR_REGIONS
        return self._worth.decide(subject.id, key, compute_seconds, self._trip_seconds, self._write_seconds)
