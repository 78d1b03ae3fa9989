"""The native engine: a gRPC server on the event loop, with fast paths that need no asyncio task.

The coroutine of a fast path begins as its request is read. If it ends without waiting it is answered with the others of
the same chunk; the rest continue when those answers have been written. All other methods run in a task each.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import errno
import logging
import os
import random
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

import grpc

from services.runtime import faults
from services.runtime.driver import Driver
from services.runtime.rpc.access import Guard
from services.runtime.rpc.backlog import MAX_UNREAD_BYTES, Address, Backlog, parse_peer
from services.runtime.rpc.call_context import CallContext, Method, run
from services.runtime.rpc.http2_connection import Connection, Stream
from services.runtime.rpc.request_head import ANSWER, RequestHead, headers, read_head, trailers
from services.runtime.rpc.rpc import (
    MAX_METADATA_BYTES,
    Answer,
    Failure,
    FastPath,
    Handler,
    Metadata,
    check_metadata,
    failure,
    status_details,
)

log = logging.getLogger(__name__)

_NO_GUARDS: Final[Mapping[str, Guard | None]] = {}
# Calls at once on one connection; clients queue further ones.
MAX_STREAMS: Final = 1024
_BATCH: Final = 64
_AGE_SPREAD: Final = 0.1
# Delay of `afterwards` callbacks, to batch them.
_AFTERWARDS_SECONDS: Final = 0.02
# Bytes of requests that came in parts, of all calls together: at least this, and so many of the largest.
_REQUEST_BYTES: Final = 2 << 30
_LARGEST_REQUESTS: Final = 8
# How long a server that stops waits for clients to take the refusals of what it has ended; and, after that, for them to
# leave, if nothing comes from any of them meanwhile.
_FLUSH_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.01
# A client that is silent for the first time is probed so often; it is gone if it does not answer the probes.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
# Of an address that this host does not have, such as ::1 where IPv6 is off.
_NOT_OURS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
# Connections wait in the kernel while this process or machine cannot have more of them.
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_AGAIN_SECONDS: Final = 1.0
# A call that waits, and its coroutine.
_Suspended: TypeAlias = "tuple[Coroutine[Any, Any, Answer | Failure], Stream]"


class NativeServer:
    """Like grpc.aio.Server, for one address without TLS."""

    def __init__(
        self,
        paths: Mapping[str, FastPath],
        max_message_bytes: int,
        max_metadata_bytes: int = 4 * MAX_METADATA_BYTES,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        guards: Mapping[str, Guard | None] = _NO_GUARDS,
        *,
        share_port: bool = False,
    ) -> None:
        """`guards`: checks of the callers of fast paths; they raise RingmeshError."""
        self.max_message_bytes = max_message_bytes
        self.max_metadata_bytes = max_metadata_bytes
        self.max_streams = MAX_STREAMS
        self.request_bytes = 0
        self.max_request_bytes = max(_REQUEST_BYTES, _LARGEST_REQUESTS * max_message_bytes)
        self.backlog = Backlog(max_unread_bytes, self._ended_bytes)
        self._share_port = share_port
        self._paths = paths
        self._guards = guards
        self._methods: dict[str, Method] = {}
        self._sockets: list[socket.socket] = []
        # Of a Unix socket, with what tells it from one that another process has put there since.
        self._path: tuple[str, os.stat_result] | None = None
        # Connections that have been accepted and are not open yet.
        self._opening: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        # With the number by which channelz calls each, when it began, and what a greatest age is multiplied by for it.
        self._connections: dict[Connection, tuple[int, float, float]] = {}
        self._opened = 0
        self._suspended: list[_Suspended] = []
        # Pending `afterwards` callbacks, and whether the event loop is scheduled to run them.
        self._afterwards: deque[Callable[[], None]] = deque()
        self._is_scheduled = False
        # The calls that have begun, except those that are answered at once.
        self._under_way: set[Stream] = set()
        # Bytes of answers since the start.
        self._handed = 0

    # As grpc.aio.Server.

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        for name, handler in method_handlers.items():
            path = f"/{service_name}/{name}"
            self._methods[path] = Method(handler, self._paths.get(path), self._guards.get(path))

    def add_generic_rpc_handlers(self, generic_rpc_handlers: object) -> None:
        """Does nothing: grpcio takes the same handlers once more."""

    def add_insecure_port(self, address: str) -> int:
        """Binds host:port or unix:path, and returns the port. Raises RuntimeError if that is not possible."""
        try:
            if address.startswith("unix:"):
                path = address.removeprefix("unix:").removeprefix("//")
                self._sockets = [_bind_unix(path)]
                self._path = path, os.stat(path)  # noqa: PTH116
                return 1
            self._sockets = _bind(address, share_port=self._share_port)
        except (OSError, OverflowError, ValueError) as error:
            raise RuntimeError(f"cannot bind {address}: {error}") from error
        port: int = self._sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for listening in self._sockets:
            listening.listen(socket.SOMAXCONN)
            self._listen(listening)

    async def stop(self, grace: float | None) -> None:
        """Refuses new calls, waits for those that have begun to come, and closes when their answers are sent."""
        # Clients may make them again elsewhere: REFUSED_STREAM says that nothing was done.
        self.max_streams = 0
        await self.stop_listening()
        end = time.monotonic() + (grace or 0)
        waiting = asyncio.create_task(self._be_idle())
        await asyncio.wait([waiting], timeout=grace or 0)
        waiting.cancel()
        for stream in list(self._under_way):
            cancel, stream.cancel = stream.cancel, None
            stream.connection.fail(stream, grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            if cancel is not None:
                cancel()
        flushed = time.monotonic() + _FLUSH_SECONDS
        while any(connection.unsent for connection in self._connections) and time.monotonic() < flushed:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)
        for connection in list(self._connections):
            connection.finish()
        await self._be_left(max(end, flushed))
        for connection in list(self._connections):
            connection.abort()

    async def _be_left(self, end: float) -> None:
        """Waits until all clients have left, or do nothing, or `end`."""
        seen, still = (0, 0), end
        while self._connections and (now := time.monotonic()) < min(end, still):
            found = len(self._connections), sum([connection.ignored for connection in self._connections])
            if found != seen:
                seen, still = found, now + _FLUSH_SECONDS
            await asyncio.sleep(_LOOK_SECONDS)

    def _listen(self, listening: socket.socket) -> None:
        if self._loop is not None and listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _ignore(self, listening: socket.socket) -> None:
        loop: Any = self._loop  # uvloop returns None where asyncio, and so its type, returns a bool
        if loop is not None:
            loop.remove_reader(listening)

    def _accept(self, listening: socket.socket) -> None:
        """Accepts what waits. asyncio's servers on uvloop accept one connection in each turn of the event loop, so that
        the last of 200 clients waits for 200 turns, which are long under load."""
        assert self._loop is not None
        for _ in range(_BATCH):
            try:
                accepted, _address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    log.warning("cannot accept connections: %s", error)
                    self._ignore(listening)
                    self._loop.call_later(_ACCEPT_AGAIN_SECONDS, self._listen, listening)
                    return
                # Of a client that has gone already.
                continue
            accepted.setblocking(False)
            opening = self._loop.create_task(self._open(accepted))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket) -> None:
        assert self._loop is not None
        try:
            await self._loop.connect_accepted_socket(partial(Connection, self), accepted)
        except OSError:  # its client has gone already
            accepted.close()

    async def _be_idle(self) -> None:
        while self._under_way or any(connection.is_busy for connection in self._connections):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)

    # The connections, as services.runtime.rpc.connections has those of grpcio.

    async def stop_listening(self) -> None:
        """Makes the kernel refuse new connections."""
        for listening in self._sockets:
            self._ignore(listening)
            listening.close()
        self._sockets.clear()
        if self._opening:
            await asyncio.wait(self._opening)
        if self._path is not None:
            (path, made), self._path = self._path, None
            with suppress(OSError):
                if os.path.samestat(made, os.stat(path)):  # noqa: PTH116
                    os.unlink(path)  # noqa: PTH108

    async def release(self, now: float, older_than: float = 0.0) -> bool:
        """Asks clients of connections that are `older_than` seconds old to leave; always True."""
        for connection, (_, began, longer) in list(self._connections.items()):
            if now - began >= older_than * longer and not connection.is_asked:
                connection.go_away()
        return True

    async def are_open(self) -> bool:
        return bool(self._connections)

    def numbered(self) -> list[tuple[int, str]]:
        """Each connection's number, which no other has had, and its client as gRPC names it."""
        return [(number, connection.peer) for connection, (number, _, _) in self._connections.items()]

    def acknowledged(self) -> Iterator[tuple[Address, int]]:
        """Yields the remote address of each TCP connection, and the bytes that the kernel has taken for it."""
        for connection in list(self._connections):
            address = parse_peer(connection.peer)
            if address[1]:
                yield address, connection.sent

    def cut(self, addresses: Collection[Address]) -> int:
        """Ends the connections from `addresses` and returns their number; any thread may call it."""
        assert self._loop is not None
        found = [one for one in list(self._connections) if parse_peer(one.peer) in addresses]
        for connection in found:
            self._loop.call_soon_threadsafe(connection.abort)
        return len(found)

    def _ended_bytes(self) -> int:
        return self._handed - sum([connection.unsent for connection in list(self._connections)])

    # As http2_connection.Server.

    def opened(self, connection: Connection) -> None:
        self._opened += 1
        # Randomized, so that connections that began together do not end together.
        self._connections[connection] = self._opened, time.monotonic(), random.uniform(1, 1 + _AGE_SPREAD)

    def lost(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def head(self, fields: list[tuple[bytes, bytes]], size: int) -> RequestHead[Method]:
        head: RequestHead[Method] = read_head(fields, size)
        head.method = self._methods.get(head.path)
        return head

    def begin(self, stream: Stream, message: bytes) -> None:
        head: RequestHead[Method] = stream.head
        method = head.method
        assert method is not None
        if method.path is None:
            self._start_task(stream, method, message)
            return
        answer: Answer | Failure
        try:
            # The size of all headers is above that of the metadata.
            if head.size > MAX_METADATA_BYTES:
                check_metadata(head.metadata)
            if method.guard is not None:
                method.guard(head.metadata, stream.connection.peer, message)
            coroutine = method.path(message, head.metadata, stream.deadline)
            coroutine.send(None)
        except StopIteration as end:
            answer = end.value
        except Exception as error:
            answer = failure(faults.reported(log, "a fast path failed", error))
        except asyncio.CancelledError as cancelled:
            answer = failure(faults.internal(log, "a fast path was cancelled", cancelled))
        else:
            self._suspended.append((coroutine, stream))
            return
        self._answer(stream, answer)
        if answer.afterwards is not None:
            self._afterwards.append(answer.afterwards)

    def turn_over(self) -> None:
        if self._suspended:
            suspended, self._suspended = self._suspended, []
            for coroutine, stream in suspended:
                if stream.is_closed:
                    _close(coroutine)
                    continue
                driver = Driver(coroutine, partial(self._end, stream))
                stream.cancel = driver.cancel
                self._under_way.add(stream)
                driver.start(stream.deadline)
        if self._afterwards and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(_AFTERWARDS_SECONDS, self._do_afterwards)

    def _end(self, stream: Stream, outcome: Answer | Failure | BaseException) -> None:
        self._ended(stream)
        if isinstance(outcome, asyncio.CancelledError):
            # `stop` cancelled it, or the client has left.
            outcome = Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ())
        elif isinstance(outcome, Exception):
            outcome = failure(faults.reported(log, "a fast path failed", outcome))
        assert isinstance(outcome, Answer | Failure)
        self._answer(stream, outcome)
        _do_afterwards(outcome.afterwards)

    def _ended(self, stream: Stream) -> None:
        stream.cancel = None
        self._under_way.discard(stream)

    def _do_afterwards(self) -> None:
        """Runs callbacks in batches, so that they do not block the event loop for long."""
        for _ in range(_BATCH):
            if not self._afterwards:
                self._is_scheduled = False
                return
            _do_afterwards(self._afterwards.popleft())
        asyncio.get_running_loop().call_soon(self._do_afterwards)

    def _answer(self, stream: Stream, answer: Answer | Failure) -> None:
        if stream.is_closed:
            return
        if isinstance(answer, Answer):
            self.respond(stream, (answer.body, *answer.pieces), answer.trailing)
        else:
            self.refuse(stream, answer.code, answer.message, answer.trailing)

    def respond(
        self, stream: Stream, body: tuple[bytes, ...], trailing: Metadata, initial: Metadata | None = None
    ) -> None:
        connection, backlog = stream.connection, self.backlog
        size = sum([len(piece) for piece in body])
        if not backlog.admit(connection.peer, size):
            refused = backlog.refusal()
            self.refuse(stream, refused.code, refused.message, status_details(refused))
            return
        self._handed += size
        try:
            connection.respond(stream, body, headers(initial) if initial else ANSWER, trailers(trailing))
        except Exception as error:
            self.refuse_as_fault(stream, error)

    def refuse(self, stream: Stream, code: grpc.StatusCode, message: str, trailing: Metadata) -> None:
        try:
            stream.connection.fail(stream, code, message, trailing)
        except Exception as error:
            self.refuse_as_fault(stream, error)

    def refuse_as_fault(self, stream: Stream, error: Exception) -> None:
        """Ends a call whose answer cannot be sent, such as one with metadata that gRPC does not allow."""
        fault = faults.internal(log, "an answer could not be sent", error)
        stream.connection.fail(stream, fault.code, fault.message)

    # Calls that run in a task.

    def _start_task(self, stream: Stream, method: Method, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        context = CallContext(stream)
        task = loop.create_task(run(self, stream, method, message, context))
        stream.cancel = task.cancel
        self._under_way.add(stream)
        timer = None
        if (deadline := stream.deadline) is not None:
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, stream, task)
        task.add_done_callback(partial(self._task_done, stream, context, timer))

    def _expire(self, stream: Stream, task: asyncio.Task[None]) -> None:
        stream.connection.fail(stream, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer")
        task.cancel()

    def _task_done(
        self, stream: Stream, context: CallContext, timer: asyncio.TimerHandle | None, task: asyncio.Task[None]
    ) -> None:
        if timer is not None:
            timer.cancel()
        self._ended(stream)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.refuse_as_fault(stream, error if isinstance(error, Exception) else RuntimeError(str(error)))
        context.finish()


def _close(coroutine: Coroutine[Any, Any, object]) -> None:
    try:
        coroutine.close()
    except Exception as error:
        faults.internal(log, "a fast path failed as it was closed", error)


def _do_afterwards(callback: Callable[[], None] | None) -> None:
    if callback is not None:
        try:
            callback()
        except Exception as error:
            faults.internal(log, "the work after an answer failed", error)


def _bind_unix(path: str) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 - of a process that is gone
            os.unlink(path)  # noqa: PTH108
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.setblocking(False)
    try:
        bound.bind(path)
    except OSError:
        bound.close()
        raise
    return bound


def _bind(address: str, *, share_port: bool) -> list[socket.socket]:
    """Binds all addresses of a host that this machine has, to the same port. Raises OSError, OverflowError and
    ValueError."""
    host, _, port_text = address.rpartition(":")
    host = host.strip("[]")
    port = int(port_text)
    bound: list[socket.socket] = []
    lacking: OSError | None = None
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, place in dict.fromkeys(found):
        try:
            one = _listen(family, (place[0], port, *place[2:]), is_dual=host == "::", share_port=share_port)
        except OSError as error:
            if error.errno in _NOT_OURS:
                lacking = error
                continue
            for other in bound:
                other.close()
            raise
        bound.append(one)
        port = one.getsockname()[1]
    if lacking is not None and not bound:
        raise lacking
    return bound


def _listen(family: int, place: tuple[Any, ...], *, is_dual: bool, share_port: bool) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setblocking(False)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            one.setsockopt(socket.IPPROTO_TCP, option, value)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not is_dual))
        one.bind(place)
        # Taken by another process only now: without SO_REUSEPORT two may bind, and one listen.
        one.listen(socket.SOMAXCONN)
    except OSError:
        one.close()
        raise
    return one
