"""Items that other services store in the mesh, each with a TTL and computed under a lease.

An item can change, so it is read from a store that all processes share: Redis, or the local tier if there is no Redis.
After its TTL an item can stay stored as stale. A stale item is still returned while one caller recomputes it
(stale-while-revalidate). freshness.py picks that caller shortly before the TTL ends.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from functools import partial
from typing import NamedTuple

from ringmesh.cache.v1 import cache_pb2

from cache.mesh import Mesh
from cache.policy import freshness
from cache.policy.leases import Lease, Leases
from cache.tiers.entry import Entry
from services.runtime.errors import DeadlineExceededError
from services.runtime.telemetry.supervisor import BACKGROUND

_TIMES = struct.Struct("<QQ")  # fresh until, stored until: ms since the epoch; 0: no expiry
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1


class ItemId(NamedTuple):
    """Names an item. A namespace isolates a service; within it, `tenant` isolates tenants."""

    namespace: str
    tenant: str
    key: bytes


class Item(NamedTuple):
    """A stored value. `fresh_until_ms` is 0 if the item does not expire."""

    value: bytes
    compute_us: int
    created_at_ms: int
    fresh_until_ms: int

    def is_stale(self, now_ms: float) -> bool:
        return bool(self.fresh_until_ms) and now_ms >= self.fresh_until_ms

    def is_due(self, now_ms: float, chance: float) -> bool:
        """Whether the caller with this `chance` recomputes the item."""
        return bool(self.fresh_until_ms) and freshness.is_due(self.fresh_until_ms, now_ms, self.compute_us, chance)


_MAX_USAGES = 1000
OTHER = ("other", "")


class Items:
    """Stores items in the tiers of `mesh`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._leases = Leases(mesh.shared)
        # By namespace and tenant, in this process.
        self.usages: dict[tuple[str, str], cache_pb2.UsageStats] = {}

    async def get(self, item: ItemId) -> Item | None:
        """Returns the item, fresh or stale, or None on a miss."""
        found = await self._read(self._name(item))
        self._count(item, found)
        return found

    async def put(
        self, item: ItemId, value: bytes, compute_us: int, *, ttl_ms: int = 0, stale_ms: int = 0, token: int = 0
    ) -> None:
        """Stores the item as fresh for `ttl_ms` (0: until it is evicted) and as stale for another `stale_ms`.

        `token` is the token of the lease under which the value was computed. Raises FailedPreconditionError if that
        lease has expired, so that a late holder never overwrites the value of a later one.
        """
        now_ms = int(time.time() * 1000)
        fresh_until = now_ms + ttl_ms if ttl_ms else 0
        kept_until = fresh_until + stale_ms if ttl_ms else 0
        name = self._name(item)
        entry = Entry(_TIMES.pack(fresh_until, kept_until) + value, compute_us, now_ms)
        kept_ms = ttl_ms + stale_ms if ttl_ms else None
        written = bool(token) and await self._leases.fill(name, token, entry, kept_ms)
        if self._mesh.shared is None:
            self._mesh.local.put(name, entry)
        elif not written:
            self._mesh.shared.put(name, entry, kept_ms)
        self._usage(item).fills += 1

    async def get_or_lease(self, item: ItemId, lease_ms: int, wait_seconds: float) -> tuple[Item | None, Lease | None]:
        """Returns the item, a lease to compute it, or both: a usable item and a lease to recompute it.

        If another caller holds the lease, waits for the item. Raises DeadlineExceededError after `wait_seconds`.
        Cancelled: no lease is held.
        """
        name = self._name(item)
        give_up = time.monotonic() + wait_seconds
        pause = _FIRST_PAUSE
        while True:
            found = await self._read(name)
            now_ms = time.time() * 1000
            if found is not None:
                self._count(item, found)
                due = found.is_stale(now_ms) or found.is_due(now_ms, random.random())
                return found, await self._leases.take(name, lease_ms) if due else None
            lease = await self._leases.take(name, lease_ms)
            if lease is not None:
                # The item can arrive between the look-up and the lease.
                try:
                    found = await self._read(name)
                except asyncio.CancelledError:
                    BACKGROUND.once("release of a lease", partial(self._leases.release, name, lease.token))
                    raise
                if found is None or found.is_stale(now_ms):
                    self._count(item, None)
                    return found, lease
                await self._leases.release(name, lease.token)
                continue
            if time.monotonic() + pause > give_up:
                raise DeadlineExceededError("another caller holds the lease and has not put the value yet; ask again")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def release(self, item: ItemId, token: int) -> None:
        """Returns a lease unused, so that a waiting caller can take it."""
        await self._leases.release(self._name(item), token)

    async def delete(self, item: ItemId) -> None:
        """Deletes the item in every process. Raises UnavailableError if Redis is unreachable."""
        name = self._name(item)
        if self._mesh.shared is None:
            self._mesh.local.put(name, Entry(_TIMES.pack(1, 1), 0))
        else:
            await self._mesh.shared.delete(name)

    def _name(self, item: ItemId) -> bytes:
        return self._mesh.purges.epochs.own_key(*item)

    async def _read(self, name: bytes) -> Item | None:
        shared = self._mesh.shared
        if shared is not None and not self._mesh.purges.is_known:
            return None
        entry = await shared.get(name) if shared is not None else self._mesh.local.get(name)
        if entry is None or entry.created_at_ms < self._mesh.purges.oldest_ms or len(entry.value) < _TIMES.size:
            return None
        fresh_until, kept_until = _TIMES.unpack_from(entry.value)
        if kept_until and time.time() * 1000 >= kept_until:
            return None
        return Item(entry.value[_TIMES.size :], entry.compute_us, entry.created_at_ms, fresh_until)

    def _count(self, item: ItemId, found: Item | None) -> None:
        usage = self._usage(item)
        if found is None:
            usage.misses += 1
        else:
            usage.hits += 1
            usage.saved_compute_us += found.compute_us

    def _usage(self, item: ItemId) -> cache_pb2.UsageStats:
        owner = (item.namespace, item.tenant)
        if owner not in self.usages:
            owner = owner if len(self.usages) < _MAX_USAGES else OTHER
            tier = "local" if self._mesh.shared is None else "shared"
            self.usages.setdefault(owner, cache_pb2.UsageStats(model=owner[0], tenant=owner[1], tier=tier))
        return self.usages[owner]
