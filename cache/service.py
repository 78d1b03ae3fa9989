"""`ringmesh.cache.v1.CacheService`: the mesh for other services."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from ringmesh.cache.v1 import cache_pb2

from cache.entry import Entry
from cache.mesh import Mesh
from services.runtime.errors import InvalidArgumentError
from services.runtime.rpc import Context, Service, unary

_MAX_KEY_BYTES = 1024


class CacheService:
    """Get, GetMany, Put and Stats over the tiers of `mesh`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def service(self) -> Service:
        """The handlers, to be served."""
        return Service(
            cache_pb2.DESCRIPTOR.services_by_name["CacheService"],
            {
                "Get": unary(cache_pb2.GetRequest, self._get),
                "GetMany": unary(cache_pb2.GetManyRequest, self._get_many),
                "Put": unary(cache_pb2.PutRequest, self._put),
                "Stats": unary(cache_pb2.StatsRequest, self._stats),
            },
        )

    async def _get(self, request: cache_pb2.GetRequest, _: Context) -> cache_pb2.GetResponse:
        return await self._look_up(request.key, "key")

    async def _get_many(self, request: cache_pb2.GetManyRequest, _: Context) -> cache_pb2.GetManyResponse:
        # Started together, the look-ups leave as one round trip.
        lookups = (self._look_up(key, f"keys[{index}]") for index, key in enumerate(request.keys))
        return cache_pb2.GetManyResponse(results=await asyncio.gather(*lookups))

    async def _put(self, request: cache_pb2.PutRequest, _: Context) -> cache_pb2.PutResponse:
        _check_key(request.key, "key")
        entry = Entry(request.value, request.compute_us)
        self._mesh.local.put(request.key, entry)
        if self._mesh.shared is not None:
            self._mesh.shared.put(request.key, entry)
        return cache_pb2.PutResponse()

    async def _stats(self, _: cache_pb2.StatsRequest, __: Context) -> cache_pb2.StatsResponse:
        tiers = (self._mesh.local, self._mesh.shared)
        return cache_pb2.StatsResponse(
            tiers=[cache_pb2.TierStats(**asdict(tier.counters)) for tier in tiers if tier is not None]
        )

    async def _look_up(self, key: bytes, field: str) -> cache_pb2.GetResponse:
        _check_key(key, field)
        entry = self._mesh.local.get(key)
        if entry is None and self._mesh.shared is not None:
            entry = await self._mesh.shared.get(key)
            if entry is not None:
                self._mesh.local.put(key, entry)
        if entry is None:
            return cache_pb2.GetResponse()
        return cache_pb2.GetResponse(
            entry=cache_pb2.Entry(value=entry.value, compute_us=entry.compute_us, created_at_ms=entry.created_at_ms)
        )


def _check_key(key: bytes, field: str) -> None:
    if not 0 < len(key) <= _MAX_KEY_BYTES:
        raise InvalidArgumentError(f"{field} has {len(key)} bytes; a key has 1 to {_MAX_KEY_BYTES}", field=field)
