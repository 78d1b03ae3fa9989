"""The console's HTTP server, on the event loop of the process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from services.runtime.rpc.server import StartError
from services.runtime.rpc.tls import TlsFiles

# A connection is closed if its client leaves data unread for this long, or if its host has gone without a word.
_UNREAD_SECONDS = 30
_IDLE_SECONDS = 60


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs no signal handlers, because the process has its own."""
        yield


class HttpServer:
    """Serves `app` on one address. `tls`: None: in plain text."""

    def __init__(self, app: ASGIApp, address: str, tls: TlsFiles | None = None) -> None:
        self._address = address
        self._tls = tls
        # Without proxy_headers: whoever connects decides, not what it says of its own callers.
        self._config = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, server_header=False, proxy_headers=False
        )
        self._server = _Server(self._config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts serving. Raises StartError if the address is in use or not local, and TlsError."""
        if self._tls is not None:
            context = self._tls.context()
            self._config.ssl_context_factory = lambda *_: context
        host, _, port = self._address.rpartition(":")
        host = host.strip("[]")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these options.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        try:
            listener.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            listener.close()
            raise StartError(f"cannot listen on {self._address}: {error}") from None
        self._task = asyncio.create_task(self._server.serve([listener]))

    async def stop(self, grace: float) -> None:
        """Refuses new requests and waits up to `grace` seconds for requests in progress."""
        if self._task is None:
            return
        self._server.should_exit = True
        _, late = await asyncio.wait([self._task], timeout=grace)
        for task in late:
            task.cancel()
