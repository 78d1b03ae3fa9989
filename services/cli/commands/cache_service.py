"""`ringmesh cache`: shows the contents and savings of the caches of router and cache service, and purges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc

from services.cli.commands import running, tables
from services.cli.errors import CommandError


def listing(processes: Mapping[str, str]) -> Table:
    """Returns a table with one row per tier of each process. `processes` maps names to host:port.

    Raises CommandError.
    """
    counts = ("hits", "misses", "hit ratio", "fills", "evicted", "failed", "entries", "MiB", "saved s")
    table = tables.create("process", "tier", *(f">{name}" for name in counts))
    for name, address in processes.items():
        stats = _ask(address, name, lambda stub: stub.Stats(cache_pb2.StatsRequest()))
        for tier in stats.tiers:
            lookups = tier.hits + tier.misses
            table.add_row(
                name,
                tier.tier,
                f"{tier.hits:,}",
                f"{tier.misses:,}",
                f"{tier.hits / lookups:.0%}" if lookups else "",
                f"{tier.fills:,}",
                f"{tier.evictions:,}",
                f"{tier.failures:,}",
                f"{tier.entries:,}",
                f"{tier.bytes / (1 << 20):.1f}",
                f"{tier.saved_compute_us / 1e6:.1f}",
            )
    return table


def purge(address: str, *, even_if_unknown: bool, **scopes: Any) -> cache_pb2.PurgeResponse:
    """Purges one scope: everything, a model, a tenant or a key. Returns when all processes apply it.

    `address`: a router or the cache service. Raises CommandError, also if not exactly one scope is set.
    """
    chosen = {name: value for name, value in scopes.items() if value}
    if len(chosen) != 1:
        raise CommandError("name what to purge by one of --everything, --model, --tenant and --key")
    try:
        chosen |= {"key": bytes.fromhex(chosen["key"])} if "key" in chosen else {}
    except ValueError:
        raise CommandError(f"--key: {chosen['key']!r} is not hexadecimal; `ringmesh explain` shows keys") from None
    request = cache_pb2.PurgeRequest(**chosen, even_if_unknown=even_if_unknown)
    return _ask(address, "cache", lambda stub: stub.Purge(request))


def _ask(
    address: str, process: str, call: Callable[[cache_pb2_grpc.CacheServiceStub], running.Answer]
) -> running.Answer:
    return running.ask(address, process, lambda channel: call(cache_pb2_grpc.CacheServiceStub(channel)))
