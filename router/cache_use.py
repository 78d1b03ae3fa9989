"""How often this router's cache had an answer, by model version."""

from __future__ import annotations

from ringmesh.oip.v2 import grpc_service_pb2 as v2


class CacheUse:
    """Hits and misses of one model version, with the time they took in nanoseconds."""

    __slots__ = ("hit_ns", "hits", "miss_ns", "misses")

    def __init__(self) -> None:
        self.hits = self.hit_ns = self.misses = self.miss_ns = 0

    def add_to(self, statistics: v2.ModelStatistics) -> None:
        """As Triton counts: a hit is a success that was queued, and no inference and no execution."""
        stats = statistics.inference_stats
        stats.success.count += self.hits
        stats.success.ns += self.hit_ns
        stats.queue.count += self.hits
        stats.cache_hit.count += self.hits
        stats.cache_hit.ns += self.hit_ns
        stats.cache_miss.count += self.misses
        stats.cache_miss.ns += self.miss_ns


class CacheUses:
    """One CacheUse for each name and version."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, str], CacheUse] = {}

    def of(self, name: str, version: str) -> CacheUse:
        """Made at first use."""
        use = self._uses.get((name, version))
        if use is None:
            use = self._uses[name, version] = CacheUse()
        return use
