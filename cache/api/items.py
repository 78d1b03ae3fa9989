"""What other services keep in the mesh: items that are fresh for a time, computed by one holder of a lease.

An item may change, so it is read where all processes see the same: in Redis, and in the local tier only where there is
no Redis. Past its freshness it may be kept a while longer, stale: it still answers while one caller computes it anew
(stale-while-revalidate), who is picked a little before the end (freshness.py).
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from cache.mesh import Mesh
from cache.policy import freshness
from cache.policy.leases import Lease, Leases
from cache.tiers.entry import Entry
from services.runtime.errors import DeadlineExceededError

_TIMES = struct.Struct("<QQ")  # fresh until, kept until: ms since the epoch; 0: no end
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1


class ItemId(NamedTuple):
    """Services share the mesh by namespaces; within one, tenants are apart."""

    namespace: str
    tenant: str
    key: bytes


class Item(NamedTuple):
    """A value. `fresh_until_ms` is 0 where it has no end."""

    value: bytes
    compute_us: int
    created_at_ms: int
    fresh_until_ms: int

    def is_stale(self, now_ms: float) -> bool:
        """Whether its freshness is over."""
        return bool(self.fresh_until_ms) and now_ms >= self.fresh_until_ms

    def is_due(self, now_ms: float, chance: float) -> bool:
        """Whether the caller with this `chance` is to compute it anew."""
        return bool(self.fresh_until_ms) and freshness.is_due(self.fresh_until_ms, now_ms, self.compute_us, chance)


class Usage:
    """What one tenant of one namespace did here."""

    __slots__ = ("fills", "hits", "misses", "saved_compute_us")

    def __init__(self) -> None:
        self.hits = self.misses = self.fills = self.saved_compute_us = 0


_MAX_USAGES = 1000
OTHER = ("other", "")


class Items:
    """Items over the tiers of `mesh`. `clock` is in seconds since the epoch."""

    def __init__(self, mesh: Mesh, clock: Callable[[], float] = time.time) -> None:
        self._mesh = mesh
        self._clock = clock
        self._leases = Leases(mesh.shared)
        self.usages: dict[tuple[str, str], Usage] = {}

    async def get(self, item: ItemId) -> Item | None:
        """The item, stale or fresh; None where there is none."""
        found = await self._read(self._name(item))
        usage = self._usage(item)
        if found is None:
            usage.misses += 1
        else:
            usage.hits += 1
            usage.saved_compute_us += found.compute_us
        return found

    async def put(
        self, item: ItemId, value: bytes, compute_us: int, *, ttl_ms: int = 0, stale_ms: int = 0, token: int = 0
    ) -> None:
        """Kept for `ttl_ms` (0: as long as there is room) and stale for `stale_ms` more.

        `token`: of the lease under which it was computed. Raises FailedPreconditionError where that lease is over, so
        that a late holder never overwrites what a later one computed.
        """
        now_ms = int(self._clock() * 1000)
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
        """The item, a lease to compute it, or both: then the item answers now, and the caller is the one to renew it.

        Where another holds the lease, waits for the item. Raises DeadlineExceededError after `wait_seconds`.
        """
        name = self._name(item)
        give_up = time.monotonic() + wait_seconds
        pause = _FIRST_PAUSE
        while True:
            found = await self._read(name)
            now_ms = self._clock() * 1000
            usage = self._usage(item)
            if found is not None:
                usage.hits += 1
                usage.saved_compute_us += found.compute_us
                due = found.is_stale(now_ms) or found.is_due(now_ms, random.random())
                return found, await self._leases.take(name, lease_ms) if due else None
            lease = await self._leases.take(name, lease_ms)
            if lease is not None:
                # It may have come between the look and the lease.
                found = await self._read(name)
                if found is None or found.is_stale(now_ms):
                    usage.misses += 1
                    return found, lease
                await self._leases.release(name, lease.token)
                continue
            if time.monotonic() + pause > give_up:
                raise DeadlineExceededError("another caller holds the lease and has not put the value yet; ask again")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def release(self, item: ItemId, token: int) -> None:
        """Gives a lease back unused: who waits gets it at once."""
        await self._leases.release(self._name(item), token)

    async def delete(self, item: ItemId) -> None:
        """Forgets it everywhere. Raises UnavailableError where Redis cannot be reached."""
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
        if kept_until and self._clock() * 1000 >= kept_until:
            return None
        return Item(entry.value[_TIMES.size :], entry.compute_us, entry.created_at_ms, fresh_until)

    def _usage(self, item: ItemId) -> Usage:
        place = (item.namespace, item.tenant)
        usage = self.usages.get(place)
        if usage is None:
            place = place if len(self.usages) < _MAX_USAGES else OTHER
            usage = self.usages.setdefault(place, Usage())
        return usage
