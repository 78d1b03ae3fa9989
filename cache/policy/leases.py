"""Leases: one holder at a time computes a value. A lease expires automatically (after memcache's leases, NSDI 2013).

A lease is a key in Redis in the same slot as the value. Its token grows from holder to holder, and a value is accepted
only with the token of the current lease. If Redis is unreachable, the process grants local leases; then each cache
process can compute the value once.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, NamedTuple

from cache.tiers.entry import Entry
from cache.tiers.shared_tier import SharedTier, stored_name
from services.runtime.errors import FailedPreconditionError, UnavailableError
from services.runtime.telemetry.supervisor import BACKGROUND

_SECONDS = 1.0

_TAKE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return '' end
local t = redis.call('TIME')
local token = string.format('%.0f', t[1] * 1000000 + t[2])
redis.call('SET', KEYS[1], token, 'PX', ARGV[1])
return token
"""
# KEYS: lease, value. ARGV: token, frame, milliseconds to live.
_FILL = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('DEL', KEYS[1])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Lease(NamedTuple):
    """A granted lease. `token` grows from holder to holder."""

    token: int
    expires_in_ms: int


class Leases:
    """Grants leases through `shared`, or within this process if `shared` is None or down."""

    def __init__(self, shared: SharedTier | None) -> None:
        self._shared = shared
        self._own: dict[bytes, tuple[int, float]] = {}

    async def take(self, name: bytes, milliseconds: int) -> Lease | None:
        """Returns a lease, or None if another caller holds it. Cancelled: a lease that Redis grants is released."""
        taking = asyncio.ensure_future(self._take(name, milliseconds))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            BACKGROUND.once("release of a lease", partial(self._give_back, name, taking))
            raise

    async def _give_back(self, name: bytes, taking: asyncio.Future[Lease | None]) -> None:
        if (lease := await taking) is not None:
            await self.release(name, lease.token)

    async def _take(self, name: bytes, milliseconds: int) -> Lease | None:
        if self._shared is not None:
            try:
                token = await self._run(name, _TAKE, 1, str(milliseconds))
                return Lease(int(token), milliseconds) if token else None
            except UnavailableError:
                pass
        now = time.monotonic()
        if self._own.get(name, (0, 0.0))[1] > now:
            return None
        self._own = {each: held for each, held in self._own.items() if held[1] > now}
        token = time.time_ns() // 1000
        self._own[name] = (token, now + milliseconds / 1000)
        return Lease(token, milliseconds)

    async def fill(self, name: bytes, token: int, entry: Entry, ttl_ms: int | None) -> bool:
        """Ends the lease. Returns True if the entry was written to Redis; otherwise the caller must write it.

        Raises FailedPreconditionError if the lease has expired. `ttl_ms` None: the default TTL.
        """
        if self._end_own(name, token):
            return False
        if self._shared is not None:
            try:
                ttl = str(self._shared.ttl_ms if ttl_ms is None else ttl_ms)
                frame = self._shared.frames.pack(name, entry)
                if await self._run(name, _FILL, 2, str(token), frame, ttl):
                    return True
            except UnavailableError:
                return False
        raise FailedPreconditionError("the lease has expired or never existed; get a new one and compute under it")

    async def release(self, name: bytes, token: int) -> None:
        """Ends the lease if it has not expired."""
        if not self._end_own(name, token) and self._shared is not None:
            try:
                await self._run(name, _RELEASE, 1, str(token))
            except UnavailableError:
                return

    def _end_own(self, name: bytes, token: int) -> bool:
        held, until = self._own.get(name, (0, 0.0))
        if held != token or until <= time.monotonic():
            return False
        del self._own[name]
        return True

    async def _run(self, name: bytes, script: str, keys: int, *arguments: str | bytes) -> Any:
        stored = stored_name(name)
        lease = b"rm1:lease:{" + stored + b"}"
        assert self._shared is not None
        return await self._shared.run(stored, _SECONDS, "EVAL", script, keys, *(lease, stored)[:keys], *arguments)
