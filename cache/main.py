"""The cache service process."""

from __future__ import annotations

import asyncio
from functools import partial

from cache.api.metrics import cache_samples
from cache.api.service import CacheService
from cache.keys.purge_sweep import PurgeSweep
from cache.regions.replication import replicate
from cache.settings import CacheSettings
from cache.tiers.entry import EntryFrames
from cache.tiers.evictions import Evictions
from services.runtime.process.process import publish, run, set_title
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.spans import this_process
from services.runtime.telemetry.supervisor import BACKGROUND


async def serve(settings: CacheSettings, stopping: asyncio.Event) -> None:
    secret = settings.secret()
    mesh = settings.create_mesh(secret)
    evictions = Evictions(mesh.local)
    service = CacheService(mesh, evictions, EntryFrames(secret))
    server = settings.create_server([service.service()], settings.access())
    metrics = Metrics()
    metrics.add(lambda: cache_samples(mesh, evictions))
    metrics.add(server.calls.samples)
    set_title("cache", settings.address, await server.start())
    exposition = await publish(settings, metrics, this_process("cache"))
    mesh.start()
    replication = None
    if mesh.shared is not None and mesh.peers.peers and settings.peer_bytes_per_second:
        copy = partial(replicate, mesh.peers.peers, mesh.shared, settings.peer_bytes_per_second)
        replication = BACKGROUND.start("replication", copy)
    BACKGROUND.start("purged answers", PurgeSweep(mesh.local, mesh.purges).keep_sweeping)
    server.set_serving(True)
    await stopping.wait()
    service.close()
    if replication is not None:
        replication.cancel()
    await server.stop(settings.drain_seconds)
    exposition.close()
    await mesh.close()


def main() -> None:
    run(CacheSettings, serve)
