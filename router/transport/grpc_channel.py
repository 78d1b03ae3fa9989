"""Unary gRPC calls to one server, over our own HTTP/2 client; http2.py explains why.

Source: gRPC over HTTP2 (PROTOCOL-HTTP2.md of grpc/grpc).
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import unquote

import grpc
import hpack

from router.transport.http2 import Connection, ConnectionLostError, Stream
from services.runtime import faults
from services.runtime.errors import CODE_NAMES
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import LargeAnswer, take_apart
from services.runtime.rpc.access import CREDENTIAL

log = logging.getLogger(__name__)

Result = TypeVar("Result")

CONNECT_SECONDS = 1.0
_PREFIX_BYTES = 5
_READ_SECONDS = 0.05


class Tls(Protocol):
    """See services.runtime.rpc.service_tls."""

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection; it offers h2 by ALPN."""


class CallError(Exception):
    """The server answered with a status other than OK, or could not be reached (UNAVAILABLE).

    `lost`: the connection ended while the call was under way. `unsent`: there was no connection to send it over.
    """

    def __init__(self, code: grpc.StatusCode, details: str, *, lost: bool = False, unsent: bool = False) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.lost = lost
        self.unsent = unsent


class GrpcChannel:
    """Calls to the server at `address`, host:port. Connects at the first call, and again after a loss.

    `tls` is None for plain connections. With TLS, the server's certificate must name the host. `credential` shows the
    server that the caller is a service of its fleet.
    """

    def __init__(self, address: str, tls: Tls | None = None, credential: str = "") -> None:
        self._address = address
        self._credential = credential
        self._tls = tls
        self._connection: Connection | None = None
        # All open connections, including those that only finish their calls after a GOAWAY from the server.
        self._connections: set[Connection] = set()
        self._connecting = asyncio.Lock()
        self._header_blocks: dict[str, bytes] = {}

    def begin(
        self, method: str, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]
    ) -> Callable[[], object]:
        """Starts a call for an ExecuteResponse and returns a cancel function.

        Calls `done` after it has returned, with the serialized response (split if it is large) or an error. The cancel
        function also cancels the call at the server; `done` is then not called.
        """
        return self._begin(method, request, lambda answer: deliver(answer, done))

    def _begin(
        self, method: str, request: bytes, done: Callable[[Sequence[bytes] | CallError], None]
    ) -> Callable[[], object]:
        """As `begin`, but `done` gets the serialized response in pieces."""
        connection = self._connection
        if connection is not None and connection.is_open:
            return self._request(connection, method, request, done)

        begun: list[Callable[[], object]] = []

        async def connect_first() -> None:
            try:
                begun.append(self._request(await self._connect(), method, request, done))
            except CallError as failure:
                done(failure)
            except Exception as error:
                faults.internal(log, f"a call to {self._address} could not begin", error)
                done(CallError(grpc.StatusCode.INTERNAL, f"the call could not begin: {error!r}", unsent=True))

        begun.append(asyncio.create_task(connect_first()).cancel)
        return lambda: begun[-1]()

    async def call(self, method: str, request: bytes) -> bytes:
        """The serialized response. Raises CallError. Cancelled: also cancels the call at the server."""
        return b"".join(await outcome(lambda done: self._begin(method, request, done)))

    def _request(
        self, connection: Connection, method: str, request: bytes, done: Callable[[Sequence[bytes] | CallError], None]
    ) -> Callable[[], None]:
        headers = self._header_blocks.get(method)
        if headers is None:
            headers = self._header_blocks[method] = self._headers(method)
        body = b"\0" + len(request).to_bytes(4, "big") + request
        number = connection.request(headers, body, lambda stream: done(_answer(stream)))
        return partial(connection.cancel, number)

    def is_local(self, port: int) -> bool:
        """Whether the server is on this host and is reached directly: the connection goes to its own port, `port`."""
        return self._connection is not None and self._connection.is_local(port)

    async def ping(self, seconds: float) -> bool:
        """Whether the server's engine acknowledges an HTTP/2 PING in time; connects if necessary.

        A server whose handlers are slow answers, and one that is stopped does not. The native engine answers on the
        event loop, grpcio without Python.
        """
        try:
            async with asyncio.timeout(seconds):
                connection = await self._connect()
        except (TimeoutError, CallError):
            return False
        acknowledged = asyncio.Event()
        forget = connection.ping(acknowledged.set)
        try:
            async with asyncio.timeout(seconds):
                await acknowledged.wait()
        except TimeoutError:
            # If this process itself was blocked, the acknowledgement may have arrived but not been read.
            await asyncio.sleep(_READ_SECONDS)
        finally:
            forget()
        return acknowledged.is_set()

    def drop(self) -> None:
        """Disconnects; calls under way fail. The next call connects again."""
        for connection in list(self._connections):
            connection.close()

    async def _connect(self) -> Connection:
        async with self._connecting:
            if self._connection is not None and self._connection.is_open:
                return self._connection
            host, _, port = self._address.rpartition(":")
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    _, made = await loop.create_connection(
                        lambda: Connection(self._lost),
                        host.strip("[]"),
                        int(port),
                        ssl=self._tls.context if self._tls is not None else None,
                    )
            except TimeoutError:
                message = f"no connection to {self._address} within {CONNECT_SECONDS:g} s"
                raise CallError(grpc.StatusCode.UNAVAILABLE, message, unsent=True) from None
            except OSError as error:
                message = f"cannot connect to {self._address}: {error}"
                raise CallError(grpc.StatusCode.UNAVAILABLE, message, unsent=True) from None
            self._connections.add(made)
            self._connection = made
            return made

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._connection is connection:
            self._connection = None

    def _headers(self, method: str) -> bytes:
        """The header block of all requests for `method`. It adds nothing to the server's table, so it can be reused."""
        scheme = "http" if self._tls is None else "https"
        headers = [
            (":method", "POST"), (":scheme", scheme), (":path", method), (":authority", self._address),
            ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "ringmesh-router"),
        ]  # fmt: skip
        if self._credential:
            headers.append((CREDENTIAL, self._credential))
        return hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*header) for header in headers])


async def outcome(begin: Callable[[Callable[[Result | CallError], None]], Callable[[], object]]) -> Result:
    """Returns the result of a call. `begin` starts it with the callback for its outcome, and returns what cancels it.

    Raises CallError. Cancelled: also cancels the call.
    """
    ended: asyncio.Future[Result | CallError] = asyncio.get_running_loop().create_future()

    def done(outcome: Result | CallError) -> None:
        if not ended.done():
            ended.set_result(outcome)

    cancel = begin(done)
    try:
        result = await ended
    except asyncio.CancelledError:
        cancel()
        raise
    if isinstance(result, CallError):
        raise result
    return result


def code_of(number: int) -> grpc.StatusCode:
    """The status code of a number; UNKNOWN if there is none."""
    return grpc.StatusCode[CODE_NAMES.get(number, "UNKNOWN")]


def deliver(answer: Sequence[bytes] | CallError, done: Callable[[bytes | LargeAnswer | CallError], None]) -> None:
    """Calls `done` with an ExecuteResponse that came in pieces. A large one is split on a thread."""

    def split(taking: asyncio.Future[LargeAnswer]) -> None:
        if taking.cancelled():
            done(CallError(grpc.StatusCode.UNAVAILABLE, "the router is stopping"))
        elif error := taking.exception():
            done(CallError(grpc.StatusCode.INTERNAL, f"a response that is not an envelope: {error!r}"))
        else:
            done(taking.result())

    if isinstance(answer, CallError):
        done(answer)
    elif sum([len(piece) for piece in answer]) <= LARGE_BYTES:
        done(b"".join(answer))
    else:
        asyncio.get_running_loop().run_in_executor(None, take_apart, answer).add_done_callback(split)


def _answer(stream: Stream) -> Sequence[bytes] | CallError:
    error = stream.error
    if error is not None:
        return CallError(grpc.StatusCode.UNAVAILABLE, str(error), lost=isinstance(error, ConnectionLostError))
    headers = stream.headers
    status = headers.get("grpc-status")
    if status is None:
        http = headers.get(":status", "no status")
        return CallError(grpc.StatusCode.UNAVAILABLE, f"the server does not speak gRPC: HTTP {http}")
    if status != "0":
        code = code_of(int(status)) if status.isdecimal() else grpc.StatusCode.UNKNOWN
        return CallError(code, unquote(headers.get("grpc-message", "")))
    pieces = stream.pieces
    while len(pieces) > 1 and len(pieces[0]) < _PREFIX_BYTES:
        pieces[:2] = [pieces[0] + pieces[1]]
    first = pieces[0] if pieces else b""
    # Compiled, a slice of bytes that begins beyond their end is a SystemError.
    is_whole = len(first) >= _PREFIX_BYTES and stream.size == _PREFIX_BYTES + int.from_bytes(
        first[1:_PREFIX_BYTES], "big"
    )
    if not is_whole or first[0]:
        return CallError(grpc.StatusCode.INTERNAL, f"a response of {stream.size} bytes that is not one plain message")
    pieces[0] = first[_PREFIX_BYTES:]
    return pieces
