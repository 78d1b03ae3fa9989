"""Unix sockets between simulated processes of one host: bytes arrive in order, in pieces of any size."""

import asyncio

from tests.simulation.clock import clock
from tests.simulation.loop import NOBODY, PROCESS


class Socket:
    """A socket that a worker listens on; `factory` makes the protocol of each connection."""

    def __init__(self, loop, random, process, factory):
        self.loop = loop
        self.random = random
        self.process = process
        self.factory = factory
        self.connections = []

    async def connect(self, factory):
        """Opens a connection, for asyncio's create_unix_connection."""
        await asyncio.sleep(self.random.randint(20, 100) / 1e6)
        if not self.process.alive:
            raise ConnectionRefusedError("nobody listens")
        client = _Transport(self, PROCESS.get())
        server = _Transport(self, self.process)
        client.peer, server.peer = server, client
        client.protocol = factory()
        server.protocol = self.factory()
        self.connections.append(client)
        self.process.call(server.protocol.connection_made, server)
        client.protocol.connection_made(client)
        for end in (client, server):
            end.process.died.append(end.abort)
        return client, client.protocol


class _Transport(asyncio.Transport):
    def __init__(self, socket, process):
        super().__init__()
        self._socket = socket
        self.process = process
        self.peer = None
        self.protocol = None
        self._closing = False
        self._last_ns = 0

    def is_closing(self):
        return self._closing

    def write(self, data):
        if self._closing:
            return
        random = self._socket.random
        data = bytes(data)
        pieces = [data]
        if len(data) > 1 and random.random() < 0.1:
            at = random.randrange(1, len(data))
            pieces = [data[:at], data[at:]]
        for piece in pieces:
            self._deliver(self.peer._received, piece)

    def writelines(self, parts):
        self.write(b"".join(parts))

    def close(self):
        if not self._closing:
            self._closing = True
            self._deliver(self.peer._ended)
            self._socket.loop.call_soon(self.protocol.connection_lost, None, context=self.process.context)

    abort = close

    def get_write_buffer_size(self):
        return 0

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def get_extra_info(self, name, default=None):
        return default

    def _deliver(self, function, *args):
        self._last_ns = max(clock.ns() + self._socket.random.randint(5_000, 50_000), self._last_ns)
        self._socket.loop.call_at_ns(self._last_ns, self.peer.process.call, function, *args, context=NOBODY)

    def _received(self, data):
        if not self._closing:
            self.protocol.data_received(data)

    def _ended(self):
        if not self._closing:
            self._closing = True
            self.protocol.connection_lost(None)
