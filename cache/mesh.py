"""Combines the tiers. Order: local tier, join of equal requests, shared tier, peer regions, compute, fill."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

from cache.keys.invalidation import InvalidationLog
from cache.policy.doorkeeper import Doorkeeper
from cache.policy.freshness import Freshness
from cache.policy.leases import Leases
from cache.policy.refusals import Refusals
from cache.policy.renewals import Renewals, Renewed
from cache.policy.shared_use import SharedUse
from cache.policy.worth_asking import NO_TIER, LookUpDecision, Subject
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

# Larger answers are not written to Redis, because hashing and writing one would block the event loop.
_LARGEST_SHARED = 16 << 20
_MAX_MODELS = 4096
_SMOOTHING = 0.2
# Longer than a renewal takes.
_LEASE_MS = 60_000

Outcome: TypeAlias = Literal["hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined", "miss", "bypass"]


class Computed:
    """A computed answer. `key` is its cache key; None if the answer is not cached.

    `freshness` is the freshness of the model; None if answers do not expire. `seconds` is the time that computing took,
    including the trip to the worker. `model_digest`: of the version that ran; b"" if none did.
    """

    __slots__ = ("entry", "freshness", "key", "model_digest", "seconds", "worker")

    def __init__(
        self,
        entry: Entry,
        key: bytes | None,
        worker: str,
        freshness: Freshness | None = None,
        seconds: float = 0.0,
        model_digest: bytes = b"",
    ) -> None:
        self.entry = entry
        self.key = key
        self.worker = worker
        self.freshness = freshness
        self.seconds = seconds
        self.model_digest = model_digest


# Computes an answer. The coroutine runs under `services.runtime.driver`.
Compute: TypeAlias = "Callable[[], Coroutine[Any, Any, Computed]]"


class Found:
    """An answer, its origin, and the worker that computed it for this request ("" if it was not computed now).

    `rows`: how many rows of a batch were cached, such as "6/8"; "" if the request was not split into rows.
    `similarity`: above 0 if this is the answer to a similar request. `reason`: why the shared tier was used as it was;
    "" without a decision. `model_digest`: of the version that computed it for this request or an equal one; it differs
    from the key's if the model was replaced meanwhile. b"": the answer is that of the key's version.
    """

    __slots__ = ("entry", "model_digest", "outcome", "reason", "rows", "similarity", "worker")

    def __init__(
        self,
        entry: Entry,
        outcome: Outcome,
        worker: str = "",
        rows: str = "",
        similarity: float = 0.0,
        reason: str = "",
        model_digest: bytes = b"",
    ) -> None:
        self.entry = entry
        self.outcome = outcome
        self.worker = worker
        self.rows = rows
        self.similarity = similarity
        self.reason = reason
        self.model_digest = model_digest


class Mesh:
    """The cache tiers of one process. `shared` is None without Redis.

    `doorkeeper` keeps answers out of the shared tier until they are requested again; None: every answer is written.
    """

    def __init__(
        self,
        local: LocalTier,
        shared: SharedTier | None,
        purges: InvalidationLog,
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
        # Computations in flight, by key. Single rows of batches join and are joined here too.
        self.flights: SingleFlight[Found] = SingleFlight()
        # Trace of the request that leads each flight, so that joined requests can link to it.
        self._leaders: dict[bytes, Trace] = {}
        # Recent compute time in seconds, by subject.
        self.costs: Recent[bytes, float] = Recent(_MAX_MODELS)
        self.shared_use = SharedUse(has_peers=bool(peers.peers))
        self.renewals = Renewals()
        self._leases = Leases(shared)
        self.stale_answers = 0

    def start(self) -> None:
        """Starts the background tasks of all parts, and connects."""
        if self.shared is not None:
            self.shared.start()
        self.purges.start()
        self.peers.start()
        if self.valuable is not None:
            self.valuable.start()
        if self._doorkeeper is not None:
            self._doorkeeper.start()

    async def find(self, key: bytes, subject: Subject | None = None) -> Entry | None:
        """Returns the entry under `key` from any tier of this region."""
        entry = self.local.get(key)
        if entry is not None and entry.created_at_ms >= self.purges.oldest_ms:
            return entry
        return await self.look_up(key, subject)

    def must_compute(self, key: bytes) -> bool:
        """Whether a local miss must be computed: no shared tier, no peers, and no flight to join."""
        return self.shared is None and not self.peers.peers and key not in self.flights

    def peek(self, key: bytes) -> Entry | None:
        """Looks again in the local tier after a miss. Raises the stored InvalidArgumentError if the key was refused."""
        self.refusals.check(key)
        entry = self.local.peek(key)
        return entry if entry is not None and entry.created_at_ms >= self.purges.oldest_ms else None

    def get_or_compute(
        self, key: bytes, compute: Compute, trace: Trace, subject: Subject, freshness: Freshness | None = None
    ) -> tuple[Awaitable[Found], bool]:
        """Returns an awaitable for the answer after a local miss, and whether it joined an equal request in flight.

        A driven coroutine awaits it. Cancelling that coroutine affects neither the computation nor the other requests
        that joined it. Failures are not cached. `freshness` is None if answers do not expire.
        """
        flight = self.flights.get(key)
        if flight is None:
            return self.flights.start(key, self._lead(key, compute, trace, subject, freshness)), False
        trace.leader = self._leaders.get(key)
        return flight, True

    def is_due(self, subject: Subject, entry: Entry, freshness: Freshness, now_ms: int) -> bool:
        """Whether this look-up triggers the renewal of the entry."""
        took_us = max(entry.compute_us, 1e6 * (self.costs.get(subject.id) or 0.0))
        return freshness.is_due(entry.created_at_ms, now_ms, took_us, random.random())

    def renew(self, key: bytes, entry: Entry, compute: Compute, subject: Subject) -> None:
        """Recomputes the answer in the background."""
        self.renewals.begin(key, lambda: self._renew(key, entry, compute, subject))

    async def _renew(self, key: bytes, old: Entry, compute: Compute, subject: Subject) -> Renewed:
        """Renews an answer, in one process of the fleet if the shared tier is used for it. Raises RingmeshError.

        All processes hold the same answer and see it expire at the same moment, and a new answer reaches Redis only
        milliseconds after it was computed. Without a lease, the key's owner on the ring would compute a quick answer
        once for each process.
        """
        if not self.decide(key, subject).asks:
            computed = await driver.run(compute())
            self.learn(subject, computed.seconds)
            self.fill(computed, writes=False)
            return "computed"
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
            self.learn(subject, computed.seconds)
            kept_ms = self._kept_ms(computed)
            written = (
                computed.key == key
                and len(computed.entry.value) <= _LARGEST_SHARED
                and await self._leases.fill(key, lease.token, computed.entry, kept_ms)
            )
        except (Exception, asyncio.CancelledError) as failure:
            # Release after any failure: otherwise no process could renew the answer until the lease expires.
            await self._leases.release(key, lease.token)
            raise failure  # by its name: see scripts/check_compiled.py
        if written:
            self.local.put(key, computed.entry)
        else:
            self.fill(computed, writes=True)
        return "computed"

    async def _find_newer(self, key: bytes, old: Entry) -> bool:
        """Whether another process has renewed the answer; if so, copies it into the local tier."""
        if self.shared is None or not self.purges.is_known:
            return False
        entry = await self.shared.get_answer(key)
        if entry is None or entry.created_at_ms <= max(old.created_at_ms, self.purges.oldest_ms):
            return False
        self.local.put(key, entry)
        return True

    def decide(self, key: bytes, subject: Subject) -> LookUpDecision:
        """Whether to look `key` up in the shared tier, and to write its answer there."""
        if self.shared is None:
            return NO_TIER
        return self.shared_use.decide(subject, key, self.costs.get(subject.id))

    def explain(self, key: bytes, subject: Subject) -> str:
        """How the shared tier is used for a request, and why; "" without a shared tier."""
        return "" if self.shared is None else self.shared_use.explain(subject, key, self.costs.get(subject.id))

    async def _lead(
        self, key: bytes, compute: Compute, trace: Trace, subject: Subject, freshness: Freshness | None
    ) -> Found:
        """Leads a flight: shared tier, peers, compute, fill."""
        self._leaders[key] = trace
        try:
            decision = self.decide(key, subject)
            found: Found | None = None
            if decision.asks and not decision.waits:
                found = await driver.first_of(
                    self._get_shared(key, trace, subject, freshness),
                    self._compute(key, compute, trace, subject, freshness, writes=True),
                )
            elif decision.asks:
                found = await self._get_shared(key, trace, subject, freshness)
            if found is None:
                found = await self._compute(key, compute, trace, subject, freshness, writes=decision.asks)
            found.reason = decision.reason
            return found
        except InvalidArgumentError as error:
            # The request is invalid on every worker, but another version of the model may take it.
            if not error.model_digest or subject.id.startswith(error.model_digest):
                self.refusals.keep(key, error)
            raise
        finally:
            self._leaders.pop(key, None)

    async def _get_shared(
        self, key: bytes, trace: Trace, subject: Subject, freshness: Freshness | None
    ) -> Found | None:
        entry = await self.look_up(key, subject, trace)
        return Found(entry, "hit-shared") if entry is not None and _is_usable(entry, freshness) else None

    async def _compute(
        self,
        key: bytes,
        compute: Compute,
        trace: Trace,
        subject: Subject,
        freshness: Freshness | None,
        *,
        writes: bool,
    ) -> Found:
        """Computes the answer, or gets it from a peer region, and stores it."""
        peers = self._peers_to_ask(key, subject)
        answer = await (self._race(peers, key, compute, trace, subject, freshness) if peers else compute())
        if isinstance(answer, Entry):
            self.fill(Computed(answer, key, "", freshness), writes=writes)
            return Found(answer, "hit-peer")
        self.learn(subject, answer.seconds)
        self.fill(answer, writes=writes)
        return Found(answer.entry, "miss", answer.worker, model_digest=answer.model_digest)

    def _peers_to_ask(self, key: bytes, subject: Subject) -> Mapping[PeerRegion, LookUpDecision]:
        # A process that does not know all purges must not fetch purged answers from a peer.
        if not self.peers.peers or not self.purges.is_known or self.purges.oldest_ms:
            return {}
        return self.peers.worth_asking(subject.id, key, self.costs.get(subject.id))

    async def _race(
        self,
        peers: Mapping[PeerRegion, LookUpDecision],
        key: bytes,
        compute: Compute,
        trace: Trace,
        subject: Subject,
        freshness: Freshness | None,
    ) -> Entry | Computed:
        """Returns a peer's answer, or a computed one if no peer answers soon enough."""
        start = time.time_ns()
        answer = await self.peers.race(
            peers, subject.id, key, lambda: driver.run(compute()), lambda entry: _is_usable(entry, freshness)
        )
        trace.span("cache.peers", start, time.time_ns(), {"ringmesh.cache.hit": isinstance(answer, Entry)})
        return answer

    def learn(self, subject: Subject, seconds: float) -> None:
        """Records how long an answer took to compute, queueing included."""
        known = self.costs.get(subject.id)
        self.costs.put(subject.id, seconds if known is None else known + _SMOOTHING * (seconds - known))

    async def look_up(self, key: bytes, subject: Subject | None = None, trace: Trace | None = None) -> Entry | None:
        """Looks in the shared tier, once the purges are known. Copies a hit into the local tier.

        The result counts in the hit ratio of `subject`.
        """
        if self.shared is None or not self.purges.is_known or (subject is not None and subject.policy == "never"):
            return None
        start = time.time_ns()
        on_reply = None if subject is None else partial(self._looked_up, subject, time.monotonic())
        entry = await self.shared.get_answer(key, on_reply)
        if trace is not None:
            trace.span("cache.shared", start, time.time_ns(), {"ringmesh.cache.hit": entry is not None})
        if entry is None or entry.created_at_ms < self.purges.oldest_ms:
            return None
        # An answer that was computed meanwhile may be younger.
        held = self.local.peek(key)
        if held is None or held.created_at_ms <= entry.created_at_ms:
            self.local.put(key, entry)
        return entry

    def _looked_up(self, subject: Subject, start: float, hit: bool) -> None:
        self.shared_use.looked_up(subject, time.monotonic() - start, hit=hit)

    def fill(self, computed: Computed, *, writes: bool) -> None:
        """Stores a cacheable answer in the local tier, and with `writes` in the shared tier."""
        if computed.key is None:
            return
        self.local.put(computed.key, computed.entry)
        if not writes or len(computed.entry.value) > _LARGEST_SHARED:
            return
        kept_ms = self._kept_ms(computed)
        if self._doorkeeper is not None:
            self._doorkeeper.offer(computed.key, computed.entry, kept_ms)
        elif self.shared is not None:
            start = time.monotonic()
            self.shared.put(computed.key, computed.entry, kept_ms)
            self.shared_use.wrote(time.monotonic() - start)

    def _kept_ms(self, computed: Computed) -> int | None:
        """TTL of the answer in Redis; None: the default TTL."""
        if self.shared is None or computed.freshness is None or computed.freshness.kept_ms >= self.shared.ttl_ms:
            return None
        return computed.freshness.kept_ms

    async def close(self) -> None:
        """Cancels everything in flight and completes pending writes to Redis."""
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
    """Whether the entry is young enough to be returned."""
    return freshness is None or not freshness.is_over(entry.created_at_ms, time.time_ns() // 1_000_000)
