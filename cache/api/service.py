"""`ringmesh.cache.v1.CacheService`: gives other services and other regions access to the mesh."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sized
from dataclasses import asdict

import grpc
from ringmesh.cache.v1 import cache_pb2

from cache.api.items import Item, ItemId, Items
from cache.keys.epochs import EVERYTHING, key_scope, model_scope, tenant_scope
from cache.keys.keys import KEY_BYTES
from cache.mesh import Mesh
from cache.tiers.entry import Entry, EntryFrames
from cache.tiers.evictions import OTHER, Evictions
from cache.tiers.local_tier import MODEL_BYTES
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, some
from services.runtime.oip.absent_model import nearest
from services.runtime.oip.protocol import check_tenant
from services.runtime.request_limits import check_list
from services.runtime.rpc.rpc import Context, Service, unary

_MAX_KEY_BYTES = 1024
_MAX_KEYS = 1000
_MAX_NAME = 256
_MAX_TTL_MS = 30 * 86400 * 1000
_LEASE_MS, _MAX_LEASE_MS = 10_000, 600_000
_WAIT_MS, _MAX_WAIT_MS = 10_000, 60_000
_VALUABLE, _MAX_VALUABLE = 1000, 10_000

# Every request about one item: each has the fields namespace, tenant and key.
_ItemRequest = (
    cache_pb2.GetRequest
    | cache_pb2.PutRequest
    | cache_pb2.GetOrComputeRequest
    | cache_pb2.ReleaseRequest
    | cache_pb2.DeleteRequest
)


class CacheService:
    """Serves items, purges and statistics of the tiers of `mesh`. `frames` seals answers for other regions.

    `usages` returns the other uses of the tiers in this process. `tenant_scoped` returns the models with tenant-scoped
    answers; None if this process does not know them.
    """

    def __init__(
        self,
        mesh: Mesh,
        evictions: Evictions,
        frames: EntryFrames,
        usages: Callable[[], Iterable[cache_pb2.UsageStats]] = tuple,
        tenant_scoped: Callable[[], Collection[str]] | None = None,
    ) -> None:
        self._mesh = mesh
        self._evictions = evictions
        self._frames = frames
        self._tenant_scoped = tenant_scoped
        self._items = Items(mesh)
        self._usages = usages
        self._closed = asyncio.Event()

    def service(self) -> Service:
        return Service(
            cache_pb2.DESCRIPTOR.services_by_name["CacheService"],
            {
                "Get": unary(cache_pb2.GetRequest, self._get),
                "GetMany": unary(cache_pb2.GetManyRequest, self._get_many),
                "Put": unary(cache_pb2.PutRequest, self._put, check_list),
                "GetOrCompute": unary(cache_pb2.GetOrComputeRequest, self._get_or_compute),
                "Release": unary(cache_pb2.ReleaseRequest, self._release),
                "Delete": unary(cache_pb2.DeleteRequest, self._delete),
                "Stats": unary(cache_pb2.StatsRequest, self._stats),
                "Purge": unary(cache_pb2.PurgeRequest, self._purge),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
                "Warm": unary(cache_pb2.WarmRequest, self._warm),
                "Fetch": unary(cache_pb2.FetchRequest, self._fetch),
                "ListValuable": unary(cache_pb2.ListValuableRequest, self._list_valuable),
            },
        )

    def close(self) -> None:
        """Ends all Watch calls, so that they do not delay the stop of the server."""
        self._closed.set()

    async def _get(self, request: cache_pb2.GetRequest, _: Context) -> cache_pb2.GetResponse:
        return _found(await self._items.get(_item(request)))

    async def _get_many(self, request: cache_pb2.GetManyRequest, _: Context) -> cache_pb2.GetManyResponse:
        _check_count(request.keys)
        _check_names(request.namespace, request.tenant)
        for index, key in enumerate(request.keys):
            _check_key(key, f"keys[{index}]")
        # Look-ups that start together share one round trip.
        lookups = (self._items.get(ItemId(request.namespace, request.tenant, key)) for key in request.keys)
        return cache_pb2.GetManyResponse(results=map(_found, await asyncio.gather(*lookups)))

    async def _put(self, request: cache_pb2.PutRequest, _: Context) -> cache_pb2.PutResponse:
        item = _item(request)
        _check_most("ttl_ms", request.ttl_ms, _MAX_TTL_MS)
        _check_most("stale_ms", request.stale_ms, _MAX_TTL_MS)
        if request.stale_ms and not request.ttl_ms:
            raise InvalidArgumentError("stale_ms needs ttl_ms: an item without ttl_ms is never stale", field="stale_ms")
        await self._items.put(
            item,
            request.value,
            request.compute_us,
            ttl_ms=request.ttl_ms,
            stale_ms=request.stale_ms,
            token=request.lease_token,
        )
        return cache_pb2.PutResponse()

    async def _get_or_compute(
        self, request: cache_pb2.GetOrComputeRequest, _: Context
    ) -> cache_pb2.GetOrComputeResponse:
        item = _item(request)
        _check_most("lease_ms", request.lease_ms, _MAX_LEASE_MS)
        _check_most("wait_ms", request.wait_ms, _MAX_WAIT_MS)
        found, lease = await self._items.get_or_lease(
            item, request.lease_ms or _LEASE_MS, (request.wait_ms or _WAIT_MS) / 1000
        )
        return cache_pb2.GetOrComputeResponse(
            entry=_entry(found) if found is not None else None,
            lease=cache_pb2.Lease(token=lease.token, expires_in_ms=lease.expires_in_ms) if lease is not None else None,
        )

    async def _release(self, request: cache_pb2.ReleaseRequest, _: Context) -> cache_pb2.ReleaseResponse:
        await self._items.release(_item(request), request.lease_token)
        return cache_pb2.ReleaseResponse()

    async def _delete(self, request: cache_pb2.DeleteRequest, _: Context) -> cache_pb2.DeleteResponse:
        await self._items.delete(_item(request))
        return cache_pb2.DeleteResponse()

    async def _stats(self, _: cache_pb2.StatsRequest, __: Context) -> cache_pb2.StatsResponse:
        tiers = (self._mesh.local, self._mesh.shared)
        response = cache_pb2.StatsResponse(
            tiers=[cache_pb2.TierStats(**asdict(tier.counters)) for tier in tiers if tier is not None],
            usages=[*self._usages(), *self._items.usages.values()],
        )
        sizes: dict[str, cache_pb2.ModelBytes] = {}
        prefixes = self._evictions.models()
        for shard in self._mesh.local.shards():
            for key, entry in shard:
                model = prefixes.get(key[:MODEL_BYTES], OTHER)
                size = sizes.setdefault(model, cache_pb2.ModelBytes(model=model))
                size.entries += 1
                size.bytes += len(entry.value)
            await asyncio.sleep(0)
        for model, count in self._evictions.by_model().items():
            sizes.setdefault(model, cache_pb2.ModelBytes(model=model)).evictions = count
        response.models.extend(sizes.values())
        return response

    async def _purge(self, request: cache_pb2.PurgeRequest, _: Context) -> cache_pb2.PurgeResponse:
        scope = _scope(request)
        if request.model and not request.even_if_unknown:
            self._check_is_known(request.model)
        epoch, confirmed = await self._mesh.purges.purge([scope])
        return cache_pb2.PurgeResponse(epoch=epoch, confirmed=confirmed, warning=self._warning(request))

    def _check_is_known(self, name: str) -> None:
        """Raises NotFoundError if this process knows models, and no model or past use of the cache has that name."""
        served = {*self._evictions.models().values()}
        used = {usage.model for usage in self._usages()} | {namespace for namespace, _ in self._items.usages}
        if not served or name in served | used:
            return
        near = nearest(name, served | used)
        hint = f"did you mean {near!r}?" if near else f"there are: {some(sorted(served))}."
        raise NotFoundError(
            f"no model {name!r} is served, and nothing was cached here under that name; {hint} What an unloaded model "
            "or another service left is purged with even_if_unknown (`ringmesh cache purge --even-if-unknown`)",
            field="model",
        )

    def _warning(self, request: cache_pb2.PurgeRequest) -> str:
        """Returns why the purge can have covered less than the caller meant; "" if there is no doubt."""
        if request.model and not request.even_if_unknown and not self._evictions.models():
            return f"no models are known here, so nobody checked that there is {request.model!r}; a router checks it"
        if not request.tenant:
            return ""
        if self._tenant_scoped is None:
            return (
                "answers are purged of models that keep tenants apart (ringmesh_tenant_scope) and of no others; "
                "a router that is asked to purge says whether there are any"
            )
        if not self._tenant_scoped():
            return (
                "no model served here keeps tenants apart (ringmesh_tenant_scope), so no answer of a model was purged, "
                "only items of other services that were put for this tenant; a model's answers go by its name"
            )
        return ""

    async def _watch(self, data: bytes, _: Context) -> AsyncIterator[bytes]:
        sent: Mapping[str, int] = {}
        first = True
        while not self._closed.is_set():
            changed = self._mesh.purges.changed
            scopes = self._mesh.purges.epochs.scopes
            news = {scope: epoch for scope, epoch in scopes.items() if sent.get(scope) != epoch}
            if news or first:
                yield cache_pb2.WatchResponse(purges=news).SerializeToString()
            sent, first = scopes, False
            waits = [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(self._closed.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def _warm(self, request: cache_pb2.WarmRequest, _: Context) -> cache_pb2.WarmResponse:
        valuable = self._mesh.valuable
        if valuable is None:
            raise FailedPreconditionError("there is no shared tier to warm from; set RINGMESH_REDIS_URL")
        _check_count(request.keys, _MAX_VALUABLE)
        keys = list(request.keys) or await valuable.keys(_MAX_VALUABLE)
        entries, size = await valuable.warm(keys, request.max_bytes or self._mesh.local.capacity // 2)
        return cache_pb2.WarmResponse(entries=entries, bytes=size)

    async def _fetch(self, request: cache_pb2.FetchRequest, _: Context) -> cache_pb2.FetchResponse:
        _check_count(request.keys)
        for index, key in enumerate(request.keys):
            if len(key) != KEY_BYTES:
                raise InvalidArgumentError(f"keys[{index}] has {len(key)} bytes, not {KEY_BYTES}", field="keys")
        entries = await asyncio.gather(*map(self._mesh.find, request.keys))
        response = cache_pb2.FetchResponse()
        for key, found in zip(request.keys, entries, strict=True):
            result = response.results.add()
            if found is not None:
                result.entry.CopyFrom(_entry(found))
                result.entry.seal = self._frames.seal(key, found)
        return response

    async def _list_valuable(
        self, request: cache_pb2.ListValuableRequest, _: Context
    ) -> cache_pb2.ListValuableResponse:
        _check_most("limit", request.limit, _MAX_VALUABLE)
        valuable = self._mesh.valuable
        keys = await valuable.keys(request.limit or _VALUABLE) if valuable is not None else []
        return cache_pb2.ListValuableResponse(keys=keys)


def _item(request: _ItemRequest) -> ItemId:
    _check_key(request.key, "key")
    _check_names(request.namespace, request.tenant)
    return ItemId(request.namespace, request.tenant, request.key)


def _found(item: Item | None) -> cache_pb2.GetResponse:
    return cache_pb2.GetResponse(entry=_entry(item) if item is not None else None)


def _entry(found: Item | Entry) -> cache_pb2.Entry:
    stale = isinstance(found, Item) and found.is_stale(time.time() * 1000)
    return cache_pb2.Entry(
        value=found.value, compute_us=found.compute_us, created_at_ms=found.created_at_ms, stale=stale
    )


def _check_key(key: bytes, field: str) -> None:
    if not 0 < len(key) <= _MAX_KEY_BYTES:
        raise InvalidArgumentError(f"{field} has {len(key)} bytes; a key has 1 to {_MAX_KEY_BYTES}", field=field)


def _check_names(namespace: str, tenant: str) -> None:
    if not namespace:
        raise InvalidArgumentError(
            "namespace is empty; name it after your service and its data, such as ledger.queries: services whose items "
            "are in one overwrite each other's",
            field="namespace",
        )
    if len(namespace) > _MAX_NAME:
        raise InvalidArgumentError(f"namespace has {len(namespace)} characters; at most {_MAX_NAME}", field="namespace")
    check_tenant(tenant, "tenant")


def _check_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidArgumentError(f"{field} is {value}; at most {most}", field=field)


def _check_count(keys: Sized, most: int = _MAX_KEYS) -> None:
    if len(keys) > most:
        raise InvalidArgumentError(f"there are {len(keys)} keys; at most {most} are looked up at once", field="keys")


def _scope(request: cache_pb2.PurgeRequest) -> str:
    kind = request.WhichOneof("scope")
    if kind == "everything" and request.everything:
        return EVERYTHING
    if kind == "key":
        if len(request.key) != KEY_BYTES:
            raise InvalidArgumentError(
                f"key has {len(request.key)} bytes; the key that Explain shows has {KEY_BYTES}", field="key"
            )
        return key_scope(request.key)
    name = request.model or request.tenant
    if not name or len(name) > _MAX_NAME:
        raise InvalidArgumentError(
            f"a purge names everything (true), a model, a tenant or a key; names have 1 to {_MAX_NAME} characters",
            field=kind or "scope",
        )
    if kind == "model":
        return model_scope(name)
    check_tenant(name, "tenant")
    return tenant_scope(name)
