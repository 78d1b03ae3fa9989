"""The HTTP side of the console, on the process's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from services.runtime.rpc.server import StartError

# How long a client may leave what it was sent unread before its connection is closed.
_UNREAD_SECONDS = 30


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business."""
        yield


class HttpServer:
    """Serves `app` on one address."""

    def __init__(self, app: ASGIApp, address: str) -> None:
        self._address = address
        config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, server_header=False)
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises StartError where the address is taken or not ours."""
        host, _, port = self._address.rpartition(":")
        host = host.strip("[]")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections take it over.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
        try:
            listener.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            listener.close()
            raise StartError(f"cannot listen on {self._address}: {error}") from None
        self._task = asyncio.create_task(self._server.serve([listener]))

    async def stop(self, grace: float) -> None:
        """Turns away new requests and waits up to `grace` seconds for those under way."""
        if self._task is None:
            return
        self._server.should_exit = True
        _, late = await asyncio.wait([self._task], timeout=grace)
        for task in late:
            task.cancel()
