"""How the tiers combine: local, then equal requests joined, shared, peer regions, computed, then filled."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, NamedTuple, TypeAlias

from cache.keys.invalidation import PurgeBoard
from cache.policy.cache_control import CacheControl
from cache.policy.doorkeeper import Doorkeeper
from cache.policy.freshness import Freshness
from cache.policy.leases import Leases
from cache.policy.refusals import Refusals
from cache.policy.renewals import Renewals, Renewed
from cache.regions.peer_regions import PeerRegions
from cache.regions.valuable import Valuable
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from cache.tiers.shared_tier import SharedTier
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, RingmeshError
from services.runtime.single_flight import SingleFlight
from services.runtime.telemetry.recent import Recent
from services.runtime.telemetry.tracing import Trace

_MODEL_BYTES = 16
# Answers above are not written to Redis: to hash and write one would hold up the event loop.
_LARGEST_SHARED = 16 << 20
_MAX_MODELS = 4096
_SMOOTHING = 0.2
# Longer than a renewal may take.
_LEASE_MS = 60_000

Outcome: TypeAlias = Literal["hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined", "miss", "bypass"]


class Computed:
    """An answer that was computed: filed under `key`, which names the model version that ran; None: not kept.

    `freshness` is that of its model, None where it has no end.
    """

    __slots__ = ("entry", "freshness", "key", "worker")

    def __init__(self, entry: Entry, key: bytes | None, worker: str, freshness: Freshness | None = None) -> None:
        self.entry = entry
        self.key = key
        self.worker = worker
        self.freshness = freshness


class Renewal(NamedTuple):
    """How long an answer is given, and what computes it anew."""

    freshness: Freshness
    compute: Callable[[], Awaitable[Computed]]


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


class Flight:
    """A computation that others may join; `began` of time.monotonic."""

    __slots__ = ("answer", "began", "key")

    def __init__(self, key: bytes, answer: asyncio.Future[Found], began: float) -> None:
        self.key = key
        self.answer = answer
        self.began = began


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

    def may_lead(self, key: bytes) -> bool:
        """Whether there is nobody to join, and no other region to ask."""
        return not self.peers.peers and key not in self.flights

    def lead(self, key: bytes, trace: Trace) -> Flight:
        """For who finds it without a task, where he `may_lead`; to be ended by `found`, `land` or `fail`."""
        self._leaders[key] = trace
        return Flight(key, self.flights.begin(key), time.monotonic())

    def found(self, flight: Flight, entry: Entry) -> Found:
        """In the shared tier, for those that joined too."""
        found = Found(entry, "hit-shared")
        self._end(flight, found)
        return found

    def land(self, flight: Flight, computed: Computed) -> Found:
        """Keeps the answer and gives it to those that joined. If it raises, the flight has not ended."""
        self._learn(flight.key, time.monotonic() - flight.began)
        self.fill(computed)
        found = Found(computed.entry, "miss", computed.worker)
        self._end(flight, found)
        return found

    def fail(self, flight: Flight, error: RingmeshError) -> None:
        """Tells those that joined; does nothing if the flight has ended."""
        try:
            if isinstance(error, InvalidArgumentError):
                self.refusals.keep(flight.key, error)
        finally:
            self._end(flight, error)

    def _end(self, flight: Flight, end: Found | RingmeshError) -> None:
        """The one place where what `lead` began is over."""
        if not flight.answer.done():
            self._leaders.pop(flight.key, None)
        self.flights.end(flight.key, flight.answer, end)

    async def get_or_compute(
        self,
        key: bytes,
        compute: Callable[[], Awaitable[Computed]],
        deadline: float | None,
        trace: Trace,
        renewal: Renewal | None = None,
    ) -> Found:
        """What the local tier did not have. Equal keys in flight share one look-up and one computation.

        A cancelled caller leaves the others, and the computation, alone. A failure is not kept.
        `deadline` is the caller's, in time.monotonic. `renewal` is None where answers have no end.
        """
        # Again: between the first look and now, an equal request in flight may have been filed and be gone.
        entry = self.peek(key)
        if entry is not None and (renewal is None or self.is_usable(key, entry, renewal, time.time_ns() // 1_000_000)):
            return Found(entry, "hit-local")
        freshness = renewal.freshness if renewal is not None else None
        trace.leader = self._leaders.get(key)
        found, joined = await self.flights.run(key, lambda: self._begin(key, compute, trace, freshness), deadline)
        return Found(found.entry, "joined", found.worker) if joined else found

    def is_usable(self, key: bytes, entry: Entry, renewal: Renewal, now_ms: int) -> bool:
        """Whether its age lets it be given; where that will soon be over, it is computed anew off the path."""
        if renewal.freshness.is_over(entry.created_at_ms, now_ms):
            return False
        if self.is_due(key, entry, renewal.freshness, now_ms):
            self.renew(key, entry, renewal)
        return True

    def is_due(self, key: bytes, entry: Entry, freshness: Freshness, now_ms: int) -> bool:
        """Whether this look at it is the one to have it computed anew."""
        took_us = max(entry.compute_us, 1e6 * (self.costs.get(key[:_MODEL_BYTES]) or 0.0))
        return freshness.is_due(entry.created_at_ms, now_ms, took_us, random.random())

    def renew(self, key: bytes, entry: Entry, renewal: Renewal) -> None:
        """Computes it anew, off the path."""
        self.renewals.begin(key, lambda: self._renew(key, entry, renewal.compute))

    async def _renew(self, key: bytes, old: Entry, compute: Callable[[], Awaitable[Computed]]) -> Renewed:
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
            computed = await self._compute(key, compute)
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

    async def get_or_compute_as_told(
        self,
        key: bytes,
        compute: Callable[[], Awaitable[Computed]],
        control: CacheControl,
        trace: Trace,
        freshness: Freshness | None = None,
    ) -> Found:
        """As `get_or_compute`, within the caller's `cache-control`. Joins nobody: their answers may be too old for it.

        Nor is it given a stale one.

        Raises FailedPreconditionError where it is only-if-cached and there is nothing it takes.
        """
        if not control.no_cache:
            entry = await self.look_up(key, trace)
            now_ms = time.time_ns() // 1_000_000
            if (
                entry is not None
                and control.takes(entry.created_at_ms, now_ms)
                and (freshness is None or not freshness.is_stale(entry.created_at_ms, now_ms))
            ):
                return Found(entry, "hit-shared")
        if control.only_if_cached:
            raise FailedPreconditionError(
                "there is no such answer in the cache, and cache-control is only-if-cached", kind="not_cached"
            )
        computed = await compute()
        if not control.no_store:
            self.fill(computed)
        return Found(computed.entry, "miss", computed.worker)

    def _begin(
        self, key: bytes, compute: Callable[[], Awaitable[Computed]], trace: Trace, freshness: Freshness | None
    ) -> Coroutine[Any, Any, Found]:
        self._leaders[key] = trace
        return self._lead(key, compute, trace, freshness)

    async def _lead(
        self, key: bytes, compute: Callable[[], Awaitable[Computed]], trace: Trace, freshness: Freshness | None
    ) -> Found:
        def usable(found: Entry) -> bool:
            return freshness is None or not freshness.is_over(found.created_at_ms, time.time_ns() // 1_000_000)

        try:
            entry = await self.look_up(key, trace)
            if entry is not None and usable(entry):
                return Found(entry, "hit-shared")
            # Who cannot know what was purged here must not bring it back from there.
            may_ask = self.purges.is_known and not self.purges.oldest_ms
            peers = self.peers.worth_asking(self.costs.get(key[:_MODEL_BYTES]) or 0.0) if may_ask else []
            if peers:
                start = time.time_ns()
                answer = await self.peers.race(peers, key, lambda: self._compute(key, compute), usable)
                trace.span("cache.peers", start, time.time_ns(), {"ringmesh.cache.hit": isinstance(answer, Entry)})
                if isinstance(answer, Entry):
                    self.fill(Computed(answer, key, "", freshness))
                    return Found(answer, "hit-peer")
                computed = answer
            else:
                computed = await self._compute(key, compute)
            self.fill(computed)
            return Found(computed.entry, "miss", computed.worker)
        finally:
            self._leaders.pop(key, None)

    async def _compute(self, key: bytes, compute: Callable[[], Awaitable[Computed]]) -> Computed:
        """Learns what it costs, and of requests that are wrong wherever they are computed."""
        start = time.monotonic()
        try:
            computed = await compute()
        except InvalidArgumentError as error:
            self.refusals.keep(key, error)
            raise
        self._learn(key, time.monotonic() - start)
        return computed

    def _learn(self, key: bytes, seconds: float) -> None:
        model = key[:_MODEL_BYTES]
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
