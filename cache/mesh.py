"""How the tiers combine: local, then equal requests joined, then shared, then computed, then filled."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cache.cache_control import CacheControl
from cache.entry import Entry
from cache.local_tier import LocalTier
from cache.purge_board import PurgeBoard
from cache.shared_tier import SharedTier
from services.runtime.errors import FailedPreconditionError
from services.runtime.single_flight import SingleFlight
from services.runtime.tracing import Trace

Outcome: TypeAlias = Literal["hit-local", "hit-shared", "hit-semantic", "joined", "miss", "bypass"]


@dataclass(frozen=True, slots=True)
class Computed:
    """An answer that was computed: filed under `key`, which names the model version that ran; None: not kept."""

    entry: Entry
    key: bytes | None
    worker: str


@dataclass(frozen=True, slots=True)
class Found:
    """An answer, where it came from, and the worker that computed it now ("" where none did).

    `rows` says how many rows of a batch were known, such as "6/8"; "" where it was not taken row by row.
    `similarity` is above 0 where it is the answer to a similar request.
    """

    entry: Entry
    outcome: Outcome
    worker: str = ""
    rows: str = ""
    similarity: float = 0.0


class Mesh:
    """The caches of one process. `shared` is None where there is no Redis."""

    def __init__(self, local: LocalTier, shared: SharedTier | None, purges: PurgeBoard) -> None:
        self.local = local
        self.shared = shared
        self.purges = purges
        self._flights: SingleFlight[Found] = SingleFlight()

    def start(self) -> None:
        """Connects."""
        if self.shared is not None:
            self.shared.start()
        self.purges.start()

    async def get_or_compute(
        self, key: bytes, compute: Callable[[], Awaitable[Computed]], deadline: float | None, trace: Trace
    ) -> Found:
        """What the local tier did not have. Equal keys in flight share one look-up and one computation.

        A cancelled caller leaves the others, and the computation, alone. A failure is not kept.
        `deadline` is the caller's, in time.monotonic.
        """
        found, joined = await self._flights.run(key, lambda: self._lead(key, compute, trace), deadline)
        return Found(found.entry, "joined", found.worker) if joined else found

    async def get_or_compute_as_told(
        self, key: bytes, compute: Callable[[], Awaitable[Computed]], control: CacheControl, trace: Trace
    ) -> Found:
        """As `get_or_compute`, within the caller's `cache-control`. Joins nobody: their answers may be too old for it.

        Raises FailedPreconditionError where it is only-if-cached and there is nothing it takes.
        """
        if not control.no_cache:
            entry = await self.look_up(key, trace)
            if entry is not None and control.takes(entry.created_at_ms, time.time_ns() // 1_000_000):
                return Found(entry, "hit-shared")
        if control.only_if_cached:
            raise FailedPreconditionError("there is no such answer in the cache, and cache-control is only-if-cached")
        computed = await compute()
        if not control.no_store:
            self.fill(computed)
        return Found(computed.entry, "miss", computed.worker)

    async def _lead(self, key: bytes, compute: Callable[[], Awaitable[Computed]], trace: Trace) -> Found:
        entry = await self.look_up(key, trace)
        if entry is not None:
            return Found(entry, "hit-shared")
        computed = await compute()
        self.fill(computed)
        return Found(computed.entry, "miss", computed.worker)

    async def look_up(self, key: bytes, trace: Trace) -> Entry | None:
        """In the shared tier, once it is known what was purged; what is found goes into the local one too."""
        if self.shared is None or not self.purges.is_known:
            return None
        start = time.time_ns()
        entry = await self.shared.get(key)
        trace.span("cache.shared", start, time.time_ns(), {"ringmesh.cache.hit": entry is not None})
        if entry is None or entry.created_at_ms < self.purges.oldest_ms:
            return None
        self.local.put(key, entry)
        return entry

    def fill(self, computed: Computed) -> None:
        """Keeps it in both tiers, if it is to be kept."""
        if computed.key is not None:
            self.local.put(computed.key, computed.entry)
            if self.shared is not None:
                self.shared.put(computed.key, computed.entry)

    async def close(self) -> None:
        """Ends what is in flight and writes what Redis still lacks."""
        self._flights.close()
        await self.purges.close()
        if self.shared is not None:
            await self.shared.close()
