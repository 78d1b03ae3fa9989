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
BREAKER_OPEN = Family("ringmesh_redis_breaker_open", "gauge", "1 while the shared tier is skipped, 0 otherwise")


def cache_samples(mesh: Mesh, evictions: Evictions) -> Iterator[Sample]:
    """Samples of the counters that the tiers of `mesh` keep."""
    local, shared = mesh.local.counters, mesh.shared
    for counters in (local, shared.counters) if shared is not None else (local,):
        tier = (counters.tier,)
        yield Sample(LOOKUPS, (counters.tier, "hit"), counters.hits)
        yield Sample(LOOKUPS, (counters.tier, "miss"), counters.misses)
        yield Sample(FILLS, tier, counters.fills)
        yield Sample(FAILURES, tier, counters.failures)
        yield Sample(SAVED, tier, counters.saved_compute_us / 1e6)
    yield Sample(ENTRIES, (local.tier,), local.entries)
    yield Sample(BYTES, (local.tier,), local.bytes)
    for model, count in evictions.by_model().items():
        yield Sample(EVICTIONS, (local.tier, model), count)
    for result, renewals in mesh.renewals.counts.items():
        yield Sample(RENEWALS, (result,), renewals)
    yield Sample(FLIGHTS, (), len(mesh.flights))
    for peer in mesh.peers.peers:
        yield Sample(UNSEALED, (peer.region,), peer.unsealed)
    yield from mesh.shared_use.samples()
    yield forgotten("costs", mesh.costs)
    yield forgotten("refusals", mesh.refusals.kept)
    yield Sample(STALE, (), mesh.stale_answers)
    if shared is not None:
        yield Sample(EVICTIONS, ("shared", ""), shared.counters.evictions)
        yield Sample(BREAKER_OPEN, (), shared.is_skipped)
        yield from shared.metrics.samples()
