"""How the tiers combine: local, then equal requests joined, shared, peer regions, computed, then filled."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Literal, TypeAlias

from cache.keys.invalidation import PurgeBoard
from cache.keys.keys import MODEL_BYTES
from cache.policy.doorkeeper import Doorkeeper
from cache.policy.freshness import Freshness
from cache.policy.leases import Leases
from cache.policy.refusals import Refusals
from cache.policy.renewals import Renewals, Renewed
from cache.policy.worth_asking import Decision
from cache.regions.peer_regions import PeerRegion, PeerRegions
from cache.regions.valuable import Valuable
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from cache.tiers.shared_tier import SharedTier
from services.runtime import driver
from services.runtime.errors import InvalidArgumentError
from services.runtime.single_flight import SingleFlight
from services.runtime.telemetry.recent import Recent
from services.runtime.telemetry.tracing import Trace

# Answers above are not written to Redis: to hash and write one would hold up the event loop.
_LARGEST_SHARED = 16 << 20
_MAX_MODELS = 4096
_SMOOTHING = 0.2
# Longer than a renewal may take.
_LEASE_MS = 60_000

Outcome: TypeAlias = Literal["hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined", "miss", "bypass"]


class Computed:
    """An answer that was computed: filed under `key`, which names the model version that ran; None: not kept.

    `freshness` is that of its model, None where it has no end. `seconds`: how long it took, with the way there.
    """

    __slots__ = ("entry", "freshness", "key", "seconds", "worker")

    def __init__(
        self, entry: Entry, key: bytes | None, worker: str, freshness: Freshness | None = None, seconds: float = 0.0
    ) -> None:
        self.entry = entry
        self.key = key
        self.worker = worker
        self.freshness = freshness
        self.seconds = seconds


# Computes an answer; to be driven.
Compute: TypeAlias = "Callable[[], Coroutine[Any, Any, Computed]]"


class Found:
    """An answer, where it came from, and the worker that computed it now ("" where none did).

    `rows` says how many rows of a batch were known, such as "6/8"; "" where it was not taken row by row.
    `similarity` is above 0 where it is the answer to a similar request.
    """

    __slots__ = ("entry", "outcome", "rows", "similarity", "worker")

    def __init__(
        self, entry: Entry, outcome: Outcome, worker: str = "", rows: str = "", similarity: float = 0.0
    ) -> None:
        self.entry = entry
        self.outcome = outcome
        self.worker = worker
        self.rows = rows
        self.similarity = similarity


class Mesh:
    """The caches of one process. `shared` is None where there is no Redis.

    `doorkeeper` holds back from the shared tier what is asked for only once; None: all is written.
    """

    def __init__(
        self,
        local: LocalTier,
        shared: SharedTier | None,
        purges: PurgeBoard,
        peers: PeerRegions,
        refusals: Refusals,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self.local = local
        self.shared = shared
        self.purges = purges
        self.peers = peers
        self.valuable = Valuable(local, shared) if shared is not None else None
        self.refusals = refusals
        self._doorkeeper = doorkeeper
        # Work under way, by key: rows of batches join and are joined here too.
        self.flights: SingleFlight[Found] = SingleFlight()
        # Of the flights, so that those that join tell whose work they wait for.
        self._leaders: dict[bytes, Trace] = {}
        # What computing took of late, in seconds, by the model's half of the key.
        self.costs: Recent[bytes, float] = Recent(_MAX_MODELS)
        self.renewals = Renewals()
        self._leases = Leases(shared)
        self.stale_answers = 0

    def start(self) -> None:
        """Connects."""
        if self.shared is not None:
            self.shared.start()
        self.purges.start()
        self.peers.start()
        if self.valuable is not None:
            self.valuable.start()
        if self._doorkeeper is not None:
            self._doorkeeper.start()

    async def find(self, key: bytes) -> Entry | None:
        """What is filed under `key` in any tier of this region."""
        entry = self.local.get(key)
        if entry is not None and entry.created_at_ms >= self.purges.oldest_ms:
            return entry
        return await self.look_up(key)

    def must_compute(self, key: bytes) -> bool:
        """Whether nothing but computing can answer what the local tier did not have: nobody to join or to ask."""
        return self.shared is None and not self.peers.peers and key not in self.flights

    def peek(self, key: bytes) -> Entry | None:
        """What the local tier has by now, where it did not before. Raises what is known to be the answer."""
        self.refusals.check(key)
        entry = self.local.peek(key)
        return entry if entry is not None and entry.created_at_ms >= self.purges.oldest_ms else None

    def get_or_compute(
        self, key: bytes, compute: Compute, trace: Trace, freshness: Freshness | None = None
    ) -> tuple[Awaitable[Found], bool]:
        """What the local tier did not have, and whether an equal request in flight was joined.

        To be awaited by a driven coroutine, which leaves the others, and the computation, alone when it is cancelled. A
        failure is not kept. `freshness` is None where answers have no end.
        """
        flight = self.flights.get(key)
        if flight is None:
            return self.flights.start(key, self._lead(key, compute, trace, freshness)), False
        trace.leader = self._leaders.get(key)
        return flight, True

    def is_due(self, key: bytes, entry: Entry, freshness: Freshness, now_ms: int) -> bool:
        """Whether this look at it is the one to have it computed anew."""
        took_us = max(entry.compute_us, 1e6 * (self.costs.get(key[:MODEL_BYTES]) or 0.0))
        return freshness.is_due(entry.created_at_ms, now_ms, took_us, random.random())

    def renew(self, key: bytes, entry: Entry, compute: Compute) -> None:
        """Computes it anew, off the path."""
        self.renewals.begin(key, lambda: self._renew(key, entry, compute))

    async def _renew(self, key: bytes, old: Entry, compute: Compute) -> Renewed:
        """By one process of the fleet. Raises RingmeshError.

        All hold the same answer and see its end at the same moment, and an answer is in Redis only milliseconds after
        it was computed: the key's owner on the ring would compute a quick one for each of them. So a lease decides.
        """
        if await self._find_newer(key, old):
            return "found"
        lease = await self._leases.take(key, _LEASE_MS)
        if lease is None:
            return "busy"
        try:
            if await self._find_newer(key, old):
                await self._leases.release(key, lease.token)
                return "found"
            computed = await driver.run(compute())
            self._learn(key, computed.seconds)
            kept_ms = self._kept_ms(computed)
            written = (
                computed.key == key
                and len(computed.entry.value) <= _LARGEST_SHARED
                and await self._leases.fill(key, lease.token, computed.entry, kept_ms)
            )
        except (Exception, asyncio.CancelledError):
            # However it ended: nobody else could renew it for as long as the lease.
            await self._leases.release(key, lease.token)
            raise
        if written:
            self.local.put(key, computed.entry)
        else:
            self.fill(computed)
        return "computed"

    async def _find_newer(self, key: bytes, old: Entry) -> bool:
        """Whether another process has renewed it; then it is here too."""
        if self.shared is None or not self.purges.is_known:
            return False
        entry = await self.shared.get_answer(key)
        if entry is None or entry.created_at_ms <= max(old.created_at_ms, self.purges.oldest_ms):
            return False
        self.local.put(key, entry)
        return True

    async def _lead(self, key: bytes, compute: Compute, trace: Trace, freshness: Freshness | None) -> Found:
        """Shared tier, peers, compute, fill."""
        self._leaders[key] = trace
        try:
            if self.shared is not None:
                entry = await self.look_up(key, trace)
                if entry is not None and _is_usable(entry, freshness):
                    return Found(entry, "hit-shared")
            peers = self._peers_to_ask(key)
            answer = await (self._race(peers, key, compute, trace, freshness) if peers else compute())
            if isinstance(answer, Entry):
                self.fill(Computed(answer, key, "", freshness))
                return Found(answer, "hit-peer")
            self._learn(key, answer.seconds)
            self.fill(answer)
            return Found(answer.entry, "miss", answer.worker)
        except InvalidArgumentError as error:
            # It is wrong wherever it is computed.
            self.refusals.keep(key, error)
            raise
        finally:
            self._leaders.pop(key, None)

    def _peers_to_ask(self, key: bytes) -> Mapping[PeerRegion, Decision]:
        # Who cannot know what was purged here must not bring it back from there.
        if not self.peers.peers or not self.purges.is_known or self.purges.oldest_ms:
            return {}
        return self.peers.worth_asking(key, self.costs.get(key[:MODEL_BYTES]))

    async def _race(
        self,
        peers: Mapping[PeerRegion, Decision],
        key: bytes,
        compute: Compute,
        trace: Trace,
        freshness: Freshness | None,
    ) -> Entry | Computed:
        """A peer's answer, or what was computed because none came soon enough."""
        start = time.time_ns()
        answer = await self.peers.race(
            peers, key, lambda: driver.run(compute()), lambda entry: _is_usable(entry, freshness)
        )
        trace.span("cache.peers", start, time.time_ns(), {"ringmesh.cache.hit": isinstance(answer, Entry)})
        return answer

    def _learn(self, key: bytes, seconds: float) -> None:
        model = key[:MODEL_BYTES]
        known = self.costs.get(model)
        self.costs.put(model, seconds if known is None else known + _SMOOTHING * (seconds - known))

    async def look_up(self, key: bytes, trace: Trace | None = None) -> Entry | None:
        """In the shared tier, once it is known what was purged; what is found goes into the local one too."""
        if self.shared is None or not self.purges.is_known:
            return None
        start = time.time_ns()
        entry = await self.shared.get_answer(key)
        if trace is not None:
            trace.span("cache.shared", start, time.time_ns(), {"ringmesh.cache.hit": entry is not None})
        if entry is None or entry.created_at_ms < self.purges.oldest_ms:
            return None
        self.local.put(key, entry)
        return entry

    def fill(self, computed: Computed) -> None:
        """Keeps it in both tiers, if it is to be kept."""
        if computed.key is None:
            return
        self.local.put(computed.key, computed.entry)
        if len(computed.entry.value) > _LARGEST_SHARED:
            return
        kept_ms = self._kept_ms(computed)
        if self._doorkeeper is not None:
            self._doorkeeper.offer(computed.key, computed.entry, kept_ms)
        elif self.shared is not None:
            self.shared.put(computed.key, computed.entry, kept_ms)

    def _kept_ms(self, computed: Computed) -> int | None:
        """How long Redis is to keep it; None: as long as any."""
        if self.shared is None or computed.freshness is None or computed.freshness.kept_ms >= self.shared.ttl_ms:
            return None
        return computed.freshness.kept_ms

    async def close(self) -> None:
        """Ends what is in flight and writes what Redis still lacks."""
        self.flights.close()
        self.renewals.close()
        await self.peers.close()
        if self._doorkeeper is not None:
            await self._doorkeeper.close()
        if self.valuable is not None:
            await self.valuable.close()
        await self.purges.close()
        if self.shared is not None:
            await self.shared.close()


def _is_usable(entry: Entry, freshness: Freshness | None) -> bool:
    """Whether its age lets it be given."""
    return freshness is None or not freshness.is_over(entry.created_at_ms, time.time_ns() // 1_000_000)
