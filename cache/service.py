"""`ringmesh.cache.v1.CacheService`: the mesh for other services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict

import grpc
from ringmesh.cache.v1 import cache_pb2

from cache.entry import Entry
from cache.epochs import EVERYTHING, key_scope, model_scope, tenant_scope
from cache.mesh import Mesh
from services.runtime.errors import InvalidArgumentError
from services.runtime.rpc import Context, Service, unary

_MAX_KEY_BYTES = 1024
_MAX_NAME = 256
_PREDICTION_KEY_BYTES = 32


class CacheService:
    """Get, GetMany, Put and Stats over the tiers of `mesh`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._closed = asyncio.Event()

    def service(self) -> Service:
        """The handlers, to be served."""
        return Service(
            cache_pb2.DESCRIPTOR.services_by_name["CacheService"],
            {
                "Get": unary(cache_pb2.GetRequest, self._get),
                "GetMany": unary(cache_pb2.GetManyRequest, self._get_many),
                "Put": unary(cache_pb2.PutRequest, self._put),
                "Stats": unary(cache_pb2.StatsRequest, self._stats),
                "Purge": unary(cache_pb2.PurgeRequest, self._purge),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
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

    async def _purge(self, request: cache_pb2.PurgeRequest, _: Context) -> cache_pb2.PurgeResponse:
        epoch, confirmed = await self._mesh.purges.purge([_scope(request)])
        return cache_pb2.PurgeResponse(epoch=epoch, confirmed=confirmed)

    async def _watch(self, data: bytes, _: Context) -> AsyncIterator[bytes]:
        told: Mapping[str, int] = {}
        first = True
        while not self._closed.is_set():
            changed = self._mesh.purges.changed
            scopes = self._mesh.purges.epochs.scopes
            news = {scope: epoch for scope, epoch in scopes.items() if told.get(scope) != epoch}
            if news or first:
                yield cache_pb2.WatchResponse(purges=news).SerializeToString()
            told, first = scopes, False
            waits = [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(self._closed.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def close(self) -> None:
        """Ends all watches, so that they do not hold up the server's stop."""
        self._closed.set()

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


def _scope(request: cache_pb2.PurgeRequest) -> str:
    kind = request.WhichOneof("scope")
    if kind == "everything" and request.everything:
        return EVERYTHING
    if kind == "key":
        if len(request.key) != _PREDICTION_KEY_BYTES:
            raise InvalidArgumentError(
                f"key has {len(request.key)} bytes; an answer's key has {_PREDICTION_KEY_BYTES}, as Explain tells it",
                field="key",
            )
        return key_scope(request.key)
    name = request.model or request.tenant
    if not name or len(name) > _MAX_NAME:
        raise InvalidArgumentError(
            f"a purge names everything (true), a model, a tenant or a key; names have 1 to {_MAX_NAME} characters",
            field=kind or "scope",
        )
    return model_scope(name) if kind == "model" else tenant_scope(name)
