"""The cache service as a process."""

from __future__ import annotations

import asyncio

from cache.service import CacheService
from cache.settings import CacheSettings
from services.runtime.process import run
from services.runtime.server import Server


async def serve(settings: CacheSettings, stopping: asyncio.Event) -> None:
    """Serves until `stopping`, then drains."""
    mesh = settings.create_mesh()
    server = Server(
        settings.engine,
        settings.address,
        [CacheService(mesh).service()],
        max_message_bytes=settings.max_message_bytes,
    )
    await server.start()
    server.set_serving(True)
    await stopping.wait()
    await server.stop(settings.drain_seconds)
    await mesh.close()


def main() -> None:
    """`python -m cache`."""
    run(CacheSettings, serve)
