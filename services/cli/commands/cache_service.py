"""`ringmesh cache`: shows the contents and savings of the caches of router and cache service, and purges them."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from rich.table import Table
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc

from services.cli.commands import running
from services.cli.errors import CommandError


def listing(processes: Mapping[str, str]) -> Table:
    """Returns a table with one row per tier of each process. `processes` maps names to host:port.

    Raises CommandError.
    """

    async def call(channel: grpc.aio.Channel, seconds: float) -> cache_pb2.StatsResponse:
        return await cache_pb2_grpc.CacheServiceStub(channel).Stats(cache_pb2.StatsRequest(), timeout=seconds)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("process", "tier"):
        table.add_column(column, no_wrap=True)
    for column in ("hits", "misses", "hit ratio", "fills", "evicted", "given up", "entries", "MiB", "saved s"):
        table.add_column(column, justify="right", no_wrap=True)
    tiers = [(name, tier) for name, address in processes.items() for tier in running.ask(address, name, call).tiers]
    for name, tier in tiers:
        asked = tier.hits + tier.misses
        table.add_row(
            name,
            tier.tier,
            f"{tier.hits:,}",
            f"{tier.misses:,}",
            f"{tier.hits / asked:.0%}" if asked else "",
            f"{tier.fills:,}",
            f"{tier.evictions:,}",
            f"{tier.failures:,}",
            f"{tier.entries:,}",
            f"{tier.bytes / (1 << 20):.1f}",
            f"{tier.saved_compute_us / 1e6:.1f}",
        )
    return table


def purge_request(
    *, everything: bool, model: str, tenant: str, key: str, even_if_unknown: bool
) -> cache_pb2.PurgeRequest:
    """Returns a purge of one scope. Raises CommandError unless exactly one scope is given."""
    if sum(map(bool, (everything, model, tenant, key))) != 1:
        raise CommandError("say what to purge by one of --everything, --model, --tenant and --key")
    if everything:
        return cache_pb2.PurgeRequest(everything=True)
    if model:
        return cache_pb2.PurgeRequest(model=model, even_if_unknown=even_if_unknown)
    if tenant:
        return cache_pb2.PurgeRequest(tenant=tenant)
    try:
        return cache_pb2.PurgeRequest(key=bytes.fromhex(key))
    except ValueError:
        raise CommandError(f"--key: {key!r} is not hexadecimal; `ringmesh explain` tells keys") from None


def purge(address: str, request: cache_pb2.PurgeRequest) -> cache_pb2.PurgeResponse:
    """Sends a purge to a router or the cache service. Returns when all processes apply it. Raises CommandError."""

    async def call(channel: grpc.aio.Channel, seconds: float) -> cache_pb2.PurgeResponse:
        return await cache_pb2_grpc.CacheServiceStub(channel).Purge(request, timeout=seconds)

    return running.ask(address, "cache", call)
