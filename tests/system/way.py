"""A TCP way to a server that a test can make slow, or break under some calls."""

import asyncio
from contextlib import suppress

import hpack


class Way:
    """Takes `seconds` longer each way. While `breaks`, a connection ends when a call of `method` goes over it."""

    def __init__(self, target, method=""):
        self.seconds = 0.0
        self.breaks = False
        self._host, _, self._port = target.rpartition(":")
        # As the router's client writes it; what the server answers does not hold it.
        self._mark = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(":path", method)])

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _connected(self, reader, writer):
        with suppress(OSError, asyncio.CancelledError):  # the server is gone, or the test is over
            there = await asyncio.open_connection(self._host, int(self._port))
            await asyncio.gather(self._carry(reader, there[1]), self._carry(there[0], writer))

    async def _carry(self, reader, writer):
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if self.breaks and self._mark in data:
                    break
                loop.call_later(self.seconds, writer.write, data)
        loop.call_later(self.seconds, writer.close)
