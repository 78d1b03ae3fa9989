"""Sends envelopes to a worker on this host, over the Unix socket that the worker names."""

from __future__ import annotations  # compiled by mypyc

import asyncio
from contextlib import suppress

from router.transport.grpc_channel import CONNECT_SECONDS
from router.transport.local_connection import LocalConnection


class LocalChannel:
    """Keeps a connection to the socket. There is none before `use`, and none while it reconnects after a loss."""

    def __init__(self) -> None:
        self._path = ""
        self._connection: LocalConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False

    def connection(self) -> LocalConnection | None:
        """The open connection, if any. Starts to reconnect if it was lost."""
        if self._connection is not None and not self._connection.is_open:
            self._connection = None
            self._connect(self._path)
        return self._connection

    async def use(self, path: str) -> None:
        """Connects to the socket at `path`, if it is not connected. A failure is ignored."""
        if not self._closed and (self._connection is None or not self._connection.is_open):
            await asyncio.wait([self._connect(path)])

    def drop(self) -> None:
        """Closes the connection; envelopes under way fail. The next `use` connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """As `drop`, but permanently."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self.drop()

    def _connect(self, path: str) -> asyncio.Task[None]:
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connected(path))
        return self._connecting

    async def _connected(self, path: str) -> None:
        with suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(CONNECT_SECONDS):
                _, made = await asyncio.get_running_loop().create_unix_connection(LocalConnection, path)
            self._connection, self._path = made, path
