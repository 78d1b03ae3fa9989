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
from services.runtime.process.process import run, set_title
from services.runtime.rpc.exposition import MetricsServer
from services.runtime.rpc.server import Server
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.metrics_export import MetricsExport
from services.runtime.telemetry.process_metrics import ProcessMetrics
from services.runtime.telemetry.spans import this_process
from services.runtime.telemetry.supervisor import BACKGROUND


async def serve(settings: CacheSettings, stopping: asyncio.Event) -> None:
    secret = settings.secret()
    mesh = settings.create_mesh(secret)
    evictions = Evictions(mesh.local)
    service = CacheService(mesh, evictions, EntryFrames(secret))
    server = Server(
        settings.engine,
        settings.address,
        [service.service()],
        max_message_bytes=settings.max_message_bytes,
        max_connection_age=settings.max_connection_age_seconds,
        max_unread_bytes=settings.max_unread_bytes,
        access=settings.access(),
        tls=settings.tls(),
    )
    metrics = Metrics()
    metrics.add(BACKGROUND.samples)
    metrics.add(lambda: cache_samples(mesh, evictions))
    metrics.add(server.calls.samples)
    exposition = MetricsServer(settings.metrics_address, metrics)
    set_title("cache", settings.address, await server.start())
    await exposition.start()
    ProcessMetrics("cache", settings.engine, metrics).start()
    export = MetricsExport(settings.otlp_endpoint, this_process("cache"), metrics)
    export.start()
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
    await export.close()
    await server.stop(settings.drain_seconds)
    exposition.close()
    await mesh.close()


def main() -> None:
    run(CacheSettings, serve)
