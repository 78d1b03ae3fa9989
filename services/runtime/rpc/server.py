"""A gRPC server on either engine, with health, reflection and channelz besides its own services."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2_grpc

from services.runtime.rpc import audit_service, reflection
from services.runtime.rpc.access import Access
from services.runtime.rpc.backlog import MAX_UNREAD_BYTES, Backlog, MeasuredConnections
from services.runtime.rpc.calls import Calls
from services.runtime.rpc.connections import Connections
from services.runtime.rpc.health import Health
from services.runtime.rpc.native_channelz import NativeChannelz
from services.runtime.rpc.native_server import MAX_STREAMS, NativeServer
from services.runtime.rpc.rpc import MAX_METADATA_BYTES, Context, Handler, Service, abort
from services.runtime.rpc.tls import TlsFiles
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# Shortest interval between pings of an idle connection. grpcio ends connections that ping more often; Ringmesh's own
# channels ping every 10 s.
_PING_MILLISECONDS = 5_000
# Metadata that the engines read of a request; above MAX_METADATA_BYTES, Ringmesh refuses it with a clear message.
_METADATA_READ = 4 * MAX_METADATA_BYTES
_MAX_PENDING = 100_000
_LOOK_SECONDS = 1.0
# Bits of grpc_compression_algorithm: those that both engines have.
_IDENTITY, _GZIP = 1 << 0, 1 << 2
# Requests that callers sent before they received GOAWAY arrive within this time.
_LEAVE_SECONDS = 0.3
# A stream whose caller takes longer to read one message ends: it may hold a session of a database, or a place of few.
_READ_SECONDS = 60.0


class Engine(StrEnum):
    """The HTTP/2 implementation: our own on the event loop (native_server.py), or grpcio's C core."""

    NATIVE = "native"
    GRPCIO = "grpcio"


class ServerConnections(MeasuredConnections, Protocol):
    """The open connections of a server; see services.runtime.rpc.connections."""

    async def stop_listening(self) -> None:
        """Makes the kernel refuse new connections."""

    async def release(self, now: float, older_than: float = 0.0) -> bool:
        """Asks the clients of old connections to leave; False if some could not be asked."""

    async def are_open(self) -> bool:
        """Whether there is any."""


class StartError(Exception):
    """The process cannot start; the message says why in one line."""


class _GrpcioAnswers:
    """Unread answers of a grpcio server, whose handler task ends when the answer is sent or the caller has left."""

    def __init__(self, max_unread_bytes: int) -> None:
        self.backlog = Backlog(max_unread_bytes, lambda: self._ended_bytes)
        self._ended_bytes = 0

    def bounded(self, handler: Handler) -> Handler:
        """Returns a unary `handler` wrapped to count its answers; of a stream, the engine buffers one at a time."""
        if handler.unary_unary is None:
            return handler
        answer: Any = handler.unary_unary

        async def call(request: Any, context: Context) -> bytes:
            response: bytes = await answer(request, context)
            size = len(response)
            if not self.backlog.admit(context.peer(), size):
                await abort(context, self.backlog.refusal())
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: self._ended(size))
            return response

        return grpc.unary_unary_rpc_method_handler(call)

    def _ended(self, size: int) -> None:
        self._ended_bytes += size


def _read_in_time(handler: Handler) -> Handler:
    """Returns `handler`, wrapped if it streams: its calls are cancelled if the caller does not read for
    _READ_SECONDS."""
    parts: Any = handler
    kind = next((kind for kind in ("unary_stream", "stream_stream") if getattr(parts, kind) is not None), None)
    if kind is None:
        return handler
    answer = getattr(parts, kind)

    async def stream(request: Any, context: Context) -> AsyncIterator[bytes]:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        async with aclosing(answer(request, context)) as responses:
            async for response in responses:
                late = loop.call_later(_READ_SECONDS, task.cancel)
                try:
                    yield response
                finally:
                    late.cancel()

    made: Handler = parts._replace(**{kind: stream})
    return made


def _unchanged(handler: Handler) -> Handler:
    return handler


class _Registered:
    """Takes the place of a server, to get the handlers that a library would register."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Handler]] = {}

    def add_registered_method_handlers(self, name: str, handlers: dict[str, Handler]) -> None:
        self.handlers[name] = handlers

    def add_generic_rpc_handlers(self, _: object) -> None:
        """Does nothing: the same handlers once more."""


def _channelz(server: NativeServer | grpc.aio.Server, address: str) -> dict[str, dict[str, Handler]]:
    registered = _Registered()
    servicer = NativeChannelz(server, address) if isinstance(server, NativeServer) else channelz.aio.ChannelzServicer()
    channelz_pb2_grpc.add_ChannelzServicer_to_server(servicer, registered)
    return registered.handlers


class Server:
    """Serves `services` on one address, host:port or unix:/path; not ready until `set_serving`, drained by `stop`.

    Requests above `max_message_bytes` are answered RESOURCE_EXHAUSTED. A client is asked to leave a connection at
    `max_connection_age` seconds, because long-lived channels find new servers only when a connection ends. With
    `share_port`, other processes with that option may listen on the same port, and the kernel spreads connections over
    them. `calls` counts calls; several servers may share it. About `max_unread_bytes` of answers that callers do not
    read are held: see Backlog. `access` decides who may call what; None: see Access. `tls`: None: plain text. TLS needs
    the engine grpcio.
    """

    def __init__(
        self,
        engine: Engine,
        address: str,
        services: Sequence[Service],
        *,
        max_message_bytes: int,
        max_connection_age: float,
        share_port: bool = False,
        calls: Calls | None = None,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        access: Access | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._access = access or Access(address)
        self._services = [*services, audit_service.service(self._access.audit)]
        self._max_connection_age = max_connection_age
        self._watching: list[asyncio.Task[None]] = []
        self.health = Health(service.name for service in self._services)
        self.calls = calls or Calls()
        self._connections: ServerConnections | None = None
        self._server: NativeServer | grpc.aio.Server
        if engine is Engine.NATIVE:
            paths = {
                f"/{service.name}/{method}": path for service in services for method, path in service.fast_paths.items()
            }
            guards = {path: self._access.guard(path[1:]) for path in paths}
            self._server = native = NativeServer(
                paths, max_message_bytes, _METADATA_READ, max_unread_bytes, guards, share_port=share_port
            )
            self._connections, self._backlog, self._bounded = native, native.backlog, _unchanged
        else:
            answers = _GrpcioAnswers(max_unread_bytes)
            options = self._grpcio_options(max_message_bytes, share_port=share_port)
            self._server, self._backlog, self._bounded = (
                grpc.aio.server(options=options),
                answers.backlog,
                answers.bounded,
            )
        self.calls.add(self._backlog.samples)

    def _grpcio_options(self, max_message_bytes: int, *, share_port: bool) -> list[tuple[str, Any]]:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # By default, grpcio lets a second server take the same port without an error.
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_MILLISECONDS),
            # Equal, because between the two limits grpcio refuses requests at random.
            ("grpc.max_metadata_size", _METADATA_READ),
            ("grpc.absolute_max_metadata_size", _METADATA_READ),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            # Beyond these, grpcio ends calls of anybody with CANCELLED.
            ("grpc.server.max_pending_requests", _MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
            ("grpc.compression_enabled_algorithms_bitset", _IDENTITY | _GZIP),
        ]
        if self._tls is not None:
            # Connections cannot write to TLS.
            options.append(("grpc.max_connection_age_ms", int(self._max_connection_age * 1000)))
        return options

    async def start(self) -> int:
        """Binds, starts answering (NOT_SERVING), and returns the port.

        Raises StartError if it cannot listen there, and TlsError.
        """
        server, access = self._server, self._access
        services = [*self._services, self.health.service()]
        for service in services:
            counted = self.calls.counted(access.protect(service))
            self._register(service.name, {name: self._bounded(_read_in_time(made)) for name, made in counted.items()})
        others = _channelz(server, self._address)
        others |= reflection.handlers([*(service.name for service in services), *others])
        for name, handlers in others.items():
            guarded = {method: access.guarded(f"{name}/{method}", made) for method, made in handlers.items()}
            self._register(name, guarded)
        try:
            if self._tls is None or isinstance(server, NativeServer):
                port = server.add_insecure_port(self._address)
            else:
                port = server.add_secure_port(self._address, self._tls.credentials())
        except RuntimeError:
            raise StartError(
                f"cannot listen on {self._address}: the port is taken or the address is not ours"
            ) from None
        await server.start()
        if access.warning:
            log.warning("%s", access.warning)
        if self._connections is None:
            self._connections = Connections(port)
        self._backlog.watch(self._connections)
        self._watching = [BACKGROUND.start("slow readers", self._look_for_slow_readers)]
        if self._tls is None:
            ending = partial(self._end_old_connections, self._connections)
            self._watching.append(BACKGROUND.start("age of connections", ending))
        self._watching.append(BACKGROUND.start("keys and tokens of callers", self._access.follow))
        return port

    def _register(self, name: str, handlers: dict[str, Handler]) -> None:
        self._server.add_registered_method_handlers(name, handlers)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    def set_serving(self, serving: bool) -> None:
        self.health.set_serving(serving)

    async def stop(self, grace: float) -> None:
        """Asks clients to leave, waits up to `grace` seconds for the calls they had sent, then ends the rest."""
        self.health.set_serving(False)
        self.health.close()
        for task in self._watching:
            task.cancel()
        if self._connections is not None:
            await self._release_all(self._connections)
        await self._server.stop(grace)

    async def _release_all(self, connections: ServerConnections) -> None:
        await connections.stop_listening()
        end = time.monotonic() + _LEAVE_SECONDS
        # grpcio asks the clients of its TLS connections when it stops.
        all_asked = self._tls is not None
        # Of the connections on a Unix socket, which are those of an edge, nothing is known.
        is_unix = self._address.startswith("unix:")
        while (now := time.monotonic()) < end and (is_unix or await connections.are_open()):
            if not all_asked:
                all_asked = await connections.release(now)
            await asyncio.sleep(_LEAVE_SECONDS / 10)

    async def _end_old_connections(self, connections: ServerConnections) -> None:
        while True:
            await asyncio.sleep(self._max_connection_age / 30)
            await connections.release(time.monotonic(), self._max_connection_age)

    async def _look_for_slow_readers(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.to_thread(self._backlog.look)
