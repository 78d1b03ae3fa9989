"""A server's connections as the kernel lists them, to ask clients to leave without ending their calls.

HTTP/2 has a frame for that: GOAWAY with the highest stream id (RFC 9113 6.8), upon which a client finishes its calls
here and makes new ones on another connection. pygrpc-native never sends it, and grpc.aio only when it stops, when it
cancels calls that were on their way. But a frame is bytes: it is written here between those of the engine. A write to a
socket is whole unless its buffer is full, so a connection on which bytes are still unsent is left for the next time.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress

from services.runtime.rpc.backlog import Address

# Bytes in a TCP socket's buffer that were not sent, from Linux's sockios.h.
_SIOCOUTQNSD = 0x894B
# In Linux's tcp_info, bytes that the other end has acknowledged: 64 bits at this offset.
_TCP_INFO_BYTES = 256
_BYTES_ACKED = 120
# Of HTTP/2.
_FRAME_HEAD_BYTES = 9
# Length 8, type 7, no flags, stream 0; last stream 2^31 - 1, NO_ERROR.
_GOAWAY = b"\0\0\x08\x07\0\0\0\0\0" + struct.pack(">II", 0x7FFFFFFF, 0)


class Connections:
    """Those that this process accepted at a TCP port. Methods block."""

    def __init__(self, port: int) -> None:
        self._port = port
        # When each was first seen, by inode; inf for those that were asked to go.
        self._seen: dict[str, float] = {}

    def stop_listening(self) -> None:
        """New connections are refused, as if the process were gone.

        Each descriptor that listens becomes one of a socket that nobody knows of. After a shutdown(2) of it
        pygrpc-native would try to accept without end, with a core for itself.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as deaf:
            deaf.bind("")  # a name that the kernel makes up
            deaf.listen()
            for descriptor, _, _ in self._sockets(listening=True):
                os.dup2(deaf.fileno(), descriptor, inheritable=False)

    def release(self, now: float, older_than: float = 0.0) -> bool:
        """Asks the clients of connections seen for so long to go elsewhere; False where some could not be asked."""
        seen = {}
        all_asked = True
        for _, inode, connection in self._sockets(listening=False):
            # Spread, so that connections that began together do not end together.
            first = self._seen.get(inode) or now + random.uniform(0, older_than / 10)
            if first <= now - older_than:
                if _go_away(connection):
                    first = math.inf
                else:
                    all_asked = False
            seen[inode] = first
        self._seen = seen
        return all_asked

    def acknowledged(self) -> Iterator[tuple[Address, int]]:
        """The other end of each connection, and how many bytes it has acknowledged since the connection began."""
        for _, _, connection in self._sockets(listening=False):
            try:
                found = _peer(connection), _acknowledged(connection)
            except (OSError, struct.error):  # it is gone, or a kernel before 4.1
                continue
            yield found

    def cut(self, addresses: Collection[Address]) -> int:
        """Ends the connections from these, with all calls on them; how many there were."""
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
        """Descriptors and inodes, with a socket that is open until the next is asked for."""
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - paths would be half of the cost
            try:
                inode = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
                if not inode.startswith("socket:"):
                    continue
                connection = socket.socket(fileno=os.dup(int(name)))
            except OSError:  # closed in between
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
    """Bytes since the connection began. Raises OSError where it is gone, struct.error on a kernel before 4.1."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    acknowledged: int = struct.unpack_from("Q", info, _BYTES_ACKED)[0]
    return acknowledged


def _go_away(connection: socket.socket) -> bool:
    try:
        # The engine's SETTINGS come first, or the client takes it for a broken connection.
        with suppress(struct.error):
            if _acknowledged(connection) < _FRAME_HEAD_BYTES:
                return False
        # What was sent and is not yet acknowledged counts in TIOCOUTQ, and a fast server's answers often are not.
        (unsent,) = struct.unpack("i", fcntl.ioctl(connection, _SIOCOUTQNSD, bytes(4)))
        return unsent == 0 and connection.send(_GOAWAY, socket.MSG_DONTWAIT) == len(_GOAWAY)
    except OSError:  # it is gone
        return True
