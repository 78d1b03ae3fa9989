"""Metrics of the cache tiers of a process."""

from __future__ import annotations

from collections.abc import Iterator

from cache.mesh import Mesh
from cache.tiers.evictions import Evictions
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.recent import forgotten

_TIER = ("tier",)
LOOKUPS = Family("ringmesh_cache_lookups_total", "counter", "look-ups by result: hit, miss", ("tier", "result"))
FILLS = Family("ringmesh_cache_fills_total", "counter", "entries written", _TIER)
EVICTIONS = Family(
    "ringmesh_cache_evictions_total",
    "counter",
    "entries evicted; shared: all keys that Redis evicted, as Redis reports, the same in every process",
    ("tier", "model"),
)
FAILURES = Family(
    "ringmesh_cache_failures_total",
    "counter",
    "look-ups and fills that failed: Redis is down, slow or full, or the value is damaged",
    _TIER,
)
ENTRIES = Family("ringmesh_cache_entries", "gauge", "entries held; of the local tier only", _TIER)
BYTES = Family("ringmesh_cache_bytes", "gauge", "memory held, with keys and overhead; of the local tier only", _TIER)
SAVED = Family("ringmesh_cache_saved_compute_seconds_total", "counter", "compute time saved by hits", _TIER)
RENEWALS = Family(
    "ringmesh_cache_renewals_total",
    "counter",
    "renewals of answers before they expire, by result: computed, found (in Redis), busy (elsewhere), failed",
    ("result",),
)
UNSEALED = Family(
    "ringmesh_peer_unsealed_total",
    "counter",
    "answers of a peer region that were ignored: authenticated with another secret, or malformed",
    ("region",),
)
STALE = Family("ringmesh_cache_stale_answers_total", "counter", "stale answers: served after their time to live")
FLIGHTS = Family("ringmesh_flights", "gauge", "keys whose answer is being looked up or computed")
REDIS_SECONDS = Family("ringmesh_redis_duration_seconds", "histogram", "look-ups and writes in Redis", ("operation",))
BREAKER_OPEN = Family("ringmesh_redis_breaker_open", "gauge", "1 while the shared tier is skipped, 0 otherwise")


class CacheMetrics:
    """Reads the counters that the tiers of `mesh` keep."""

    def __init__(self, mesh: Mesh, evictions: Evictions) -> None:
        self._mesh = mesh
        self._evictions = evictions

    def samples(self) -> Iterator[Sample]:
        """Yields the samples, for `Metrics.add`."""
        shared = self._mesh.shared
        for tier in (self._mesh.local, shared):
            if tier is None:
                continue
            counters = tier.counters
            name = (counters.tier,)
            yield Sample(LOOKUPS, (counters.tier, "hit"), counters.hits)
            yield Sample(LOOKUPS, (counters.tier, "miss"), counters.misses)
            yield Sample(FILLS, name, counters.fills)
            yield Sample(FAILURES, name, counters.failures)
            yield Sample(SAVED, name, counters.saved_compute_us / 1e6)
            if tier is self._mesh.local:
                yield Sample(ENTRIES, name, counters.entries)
                yield Sample(BYTES, name, counters.bytes)
        for model, count in self._evictions.by_model().items():
            yield Sample(EVICTIONS, ("local", model), count)
        if shared is not None:
            yield Sample(EVICTIONS, ("shared", ""), shared.counters.evictions)
        for result, count in self._mesh.renewals.counts.items():
            yield Sample(RENEWALS, (result,), count)
        yield Sample(FLIGHTS, (), len(self._mesh.flights))
        for peer in self._mesh.peers.peers:
            yield Sample(UNSEALED, (peer.region,), peer.unsealed)
        yield forgotten("costs", self._mesh.costs)
        yield forgotten("refusals", self._mesh.refusals.kept)
        yield Sample(STALE, (), self._mesh.stale_answers)
        if shared is not None:
            yield Sample(BREAKER_OPEN, (), shared.is_skipped)
            yield from shared.errors.samples()
            yield Sample(REDIS_SECONDS, ("get",), shared.get_times.buckets())
            yield Sample(REDIS_SECONDS, ("set",), shared.set_times.buckets())
