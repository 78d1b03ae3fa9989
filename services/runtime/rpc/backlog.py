"""A bound, in bytes, on answers that callers have not read.

HTTP/2 lets a caller read answers as slowly as it likes, and both engines buffer the unread ones. The total of unread
bytes is known at any time. Connections are measured only when that total is large: the unread bytes of one are the
bytes answered on it, minus those that the kernel has taken (native) or the other end has acknowledged (grpcio).

A connection that would need more than a minute to drain is cut. Until then its callers are refused further answers;
other callers are served.
"""

from __future__ import annotations  # compiled by mypyc

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Protocol, TypeAlias
from urllib.parse import unquote

from services.runtime.errors import ResourceExhaustedError, some
from services.runtime.telemetry.metrics import Family, Sample

log = logging.getLogger(__name__)

UNREAD = Family("ringmesh_unread_response_bytes", "gauge", "answers that callers have not read yet")
CUT = Family("ringmesh_connections_cut_total", "counter", "connections ended because their client did not read answers")
REFUSED = Family("ringmesh_unread_refusals_total", "counter", "calls refused because too many answers are unread")
MAX_UNREAD_BYTES = 256 << 20
# Connections are measured when this fraction of the limit is unread in total, and again after as many further bytes.
_STEP = 1 / 16
# Unread bytes below which a connection's pace is not checked: the buffers of a healthy one.
_FLOOR = 256 << 10
# A connection is slow if it would need longer than this to drain.
_DRAIN_SECONDS = 60.0
# How long its pace is measured before it is cut; the shorter time applies above the limit.
_PATIENCE_SECONDS, _SHORT_PATIENCE_SECONDS = 10.0, 1.0
# Measuring costs about 20 us a connection, and takes at most this share of the time.
_PAUSE_SECONDS = 0.02
_LOOKING_SHARE = 0.1


# Host and port.
Address: TypeAlias = tuple[str, int]


class MeasuredConnections(Protocol):
    """See services.runtime.rpc.connections."""

    def acknowledged(self) -> Iterator[tuple[Address, int]]:
        """Yields the remote address of each connection, and the bytes that it has taken or acknowledged."""

    def cut(self, addresses: Collection[Address]) -> int:
        """Ends the connections from `addresses` and returns their number."""


class _Flow:
    """Bytes answered on one connection. Between two measurements `unread` is an upper estimate."""

    def __init__(self, address: Address, now: float) -> None:
        self.address = address
        self.handed = 0
        self.unread = 0
        self.acked = 0
        # Corrects for frames and headers, which are acknowledged but not part of `handed`.
        self.offset = 0
        # Start of the current measurement of its pace, and the bytes acknowledged since then.
        self.since = now
        self.moved = 0


class Backlog:
    """Unread answers of one server.

    `ended` returns the cumulative bytes of admitted answers that were sent or whose callers left. Any thread may call
    it.
    """

    def __init__(self, limit: int, ended: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._step = int(limit * _STEP)
        self._ended = ended
        self._clock = clock
        self._connections: MeasuredConnections | None = None
        self._handed = 0
        self._total = 0
        self._next_look = self._step
        # The earliest time of the next measurement.
        self._rested = 0.0
        # By the engine's peer name, and by address.
        self._flows: dict[str, _Flow] = {}
        self._by_address: dict[Address, _Flow] = {}
        self._lock = threading.Lock()
        self._cut = 0
        self._refused = 0

    def watch(self, connections: MeasuredConnections) -> None:
        self._connections = connections

    def samples(self) -> Iterator[Sample]:
        yield Sample(UNREAD, (), self._unread())
        yield Sample(CUT, (), self._cut)
        yield Sample(REFUSED, (), self._refused)

    def admit(self, peer: str, size: int) -> bool:
        """Counts an answer of `size` bytes to `peer` before the engine gets it; False: it must not be sent."""
        flow = self._flows.get(peer)
        if flow is None:
            flow = self._open(peer)
        flow.handed += size
        flow.unread += size
        self._handed += size
        if self._handed < self._next_look and flow.unread - size <= self._share(self._total):
            return True
        self.look()
        if flow.unread - size <= self._share(self._total):
            return True
        self._refused += 1
        self._handed -= size
        flow.handed -= size
        flow.unread -= size
        return False

    def refusal(self) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            "too many answers on this connection are not read yet; read them, then retry", kind="unread"
        )

    def look(self) -> None:
        """Measures connections and cuts slow ones. Any thread may call it; call it at least once a second."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._look()
        finally:
            self._lock.release()

    def _unread(self) -> int:
        return self._handed - self._ended()

    def _look(self) -> None:
        self._next_look = self._handed + self._step
        self._total = total = self._unread()
        if total <= self._step:
            self._flows.clear()
            self._by_address.clear()
            return
        now = self._clock()
        if self._connections is None or now < self._rested:
            return
        slow = []
        alive = set()
        for address, acked in self._connections.acknowledged():
            alive.add(address)
            flow = self._by_address.get(address)
            if flow is None:
                flow = self._by_address[address] = _Flow(address, now)
                flow.acked, flow.offset = acked, -acked
            elif self._is_slow(flow, acked, now):
                slow.append(flow)
        ended = self._clock()
        self._rested = ended + max(_PAUSE_SECONDS, (ended - now) / _LOOKING_SHARE)
        # A peer that the kernel cannot measure, such as a Unix socket, keeps its estimate.
        for peer, flow in list(self._flows.items()):
            if flow.address not in alive and flow.address[1]:
                self._flows.pop(peer, None)
                self._by_address.pop(flow.address, None)
        if slow:
            self._cut += self._connections.cut({flow.address for flow in slow})
            log.warning(
                "cut the connections of callers who do not read their answers: %s",
                some(f"{flow.address[0]}:{flow.address[1]} ({flow.unread} bytes)" for flow in slow),
            )

    def _is_slow(self, flow: _Flow, acked: int, now: float) -> bool:
        flow.moved += acked - flow.acked
        flow.acked = acked
        unread = flow.handed - acked - flow.offset
        if unread < 0:
            flow.offset += unread
        flow.unread = unread = min(self._total, max(0, unread))
        watched = now - flow.since
        if unread < _FLOOR:
            flow.since, flow.moved = now, 0
            return False
        if watched < (_SHORT_PATIENCE_SECONDS if self._total > self._limit else _PATIENCE_SECONDS):
            return False
        is_slow = flow.moved * _DRAIN_SECONDS < unread * watched
        flow.since, flow.moved = now, 0
        return is_slow

    def _share(self, total: int) -> int:
        """Returns the unread bytes up to which one connection gets another answer, of any size."""
        if total <= self._limit:
            return self._limit // 2
        return self._limit // 16 if total <= 2 * self._limit else _FLOOR

    def _open(self, peer: str) -> _Flow:
        address = parse_peer(peer)
        flow = self._by_address.get(address)
        if flow is None:
            flow = self._by_address[address] = _Flow(address, self._clock())
        self._flows[peer] = flow
        return flow


def parse_peer(peer: str) -> Address:
    """Parses a peer such as `ipv4:127.0.0.1:80` or `ipv6:%5B::1%5D:80`; the port is 0 if there is none."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]").partition("%")[0].removeprefix("::ffff:"), int(port) if port.isdecimal() else 0
