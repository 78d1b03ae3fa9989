"""A grpcio server's connections as the kernel lists them, to ask clients to reconnect elsewhere without ending calls.

HTTP/2 has a frame for that: GOAWAY with the highest stream id (RFC 9113 6.8). A client that receives it finishes its
calls here and makes new ones on another connection. grpc.aio sends it only when it stops, and then cancels calls in
flight. So this module writes the frame to the socket itself, between the engine's frames. A write to a socket is
complete unless its buffer is full, so a connection with unsent bytes is left for the next round.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import random
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress

from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.backlog import Address

# Request for the unsent bytes in a TCP socket's buffer, from Linux's sockios.h.
_SIOCOUTQNSD = 0x894B
# Offset in Linux's tcp_info of the bytes that the other end has acknowledged (64 bits).
_TCP_INFO_BYTES = 256
_BYTES_ACKED = 120
_GOAWAY = h2.goaway(h2.MAX, h2.NO_ERROR)


class Connections:
    """The connections that this process accepted at a TCP port."""

    def __init__(self, port: int) -> None:
        self._port = port
        # By inode: when each connection was first seen; inf if its client was asked to leave.
        self._seen: dict[str, float] = {}

    async def stop_listening(self) -> None:
        """Makes the kernel refuse new connections, as if the process were gone.

        Each listening descriptor is replaced by one of a socket that has no clients.
        """
        await asyncio.to_thread(self._deafen)

    def _deafen(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as deaf:
            deaf.bind("")  # the kernel chooses a name
            deaf.listen()
            for descriptor, _, _ in self._sockets(listening=True):
                os.dup2(deaf.fileno(), descriptor, inheritable=False)

    async def release(self, now: float, older_than: float = 0.0) -> bool:
        """Asks clients of connections seen for `older_than` seconds to leave; False if some could not be asked."""
        return await asyncio.to_thread(self._release, now, older_than)

    def _release(self, now: float, older_than: float) -> bool:
        seen = {}
        all_asked = True
        for _, inode, connection in self._sockets(listening=False):
            # Randomized, so that connections that began together do not end together.
            first = self._seen.get(inode) or now + random.uniform(0, older_than / 10)
            if first <= now - older_than:
                if _go_away(connection):
                    first = math.inf
                else:
                    all_asked = False
            seen[inode] = first
        self._seen = seen
        return all_asked

    async def are_open(self) -> bool:
        """Whether there is any."""
        return await asyncio.to_thread(lambda: any(True for _ in self._sockets(listening=False)))

    def acknowledged(self) -> Iterator[tuple[Address, int]]:
        """Yields the remote address of each connection, and the bytes it has acknowledged since the start."""
        for _, _, connection in self._sockets(listening=False):
            try:
                found = _peer(connection), _acknowledged(connection)
            except (OSError, struct.error):  # the connection is gone, or the kernel is older than 4.1
                continue
            yield found

    def cut(self, addresses: Collection[Address]) -> int:
        """Ends the connections from `addresses`, with all calls on them, and returns their number."""
        count = 0
        for _, _, connection in self._sockets(listening=False):
            try:
                if _peer(connection) in addresses:
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
            except OSError:
                continue
        return count

    def _sockets(self, *, listening: bool) -> Iterator[tuple[int, str, socket.socket]]:
        """Yields descriptors and inodes, each with a socket that is open until the next iteration."""
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - paths would be half of the cost
            try:
                inode = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
                if not inode.startswith("socket:"):
                    continue
                connection = socket.socket(fileno=os.dup(int(name)))
            except OSError:  # the descriptor was closed meanwhile
                continue
            with connection:
                try:
                    if _port(connection) != self._port:
                        continue
                    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != listening:
                        continue
                    if not listening:
                        connection.getpeername()
                except OSError:
                    continue
                yield int(name), inode, connection


def _port(connection: socket.socket) -> int | None:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    port: int = connection.getsockname()[1]
    return port


def _peer(connection: socket.socket) -> Address:
    host, port, *_ = connection.getpeername()
    return host.partition("%")[0].removeprefix("::ffff:"), port


def _acknowledged(connection: socket.socket) -> int:
    """Returns the acknowledged bytes. Raises OSError if the connection is gone, struct.error on Linux before 4.1."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    acknowledged: int = struct.unpack_from("Q", info, _BYTES_ACKED)[0]
    return acknowledged


def _go_away(connection: socket.socket) -> bool:
    try:
        # The engine's SETTINGS frame must come first, or the client treats the connection as broken.
        with suppress(struct.error):
            if _acknowledged(connection) < h2.HEAD_BYTES:
                return False
        # Not TIOCOUTQ: it also counts sent bytes that are not yet acknowledged, as a fast server's answers often are.
        (unsent,) = struct.unpack("i", fcntl.ioctl(connection, _SIOCOUTQNSD, bytes(4)))
        return unsent == 0 and connection.send(_GOAWAY, socket.MSG_DONTWAIT) == len(_GOAWAY)
    except OSError:  # the connection is gone
        return True
