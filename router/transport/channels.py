"""Protocols of the channels that a link uses, so that a simulation can supply its own network."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable
from typing import Final, Protocol

from router.transport.grpc_channel import CallError, GrpcChannel
from router.transport.local_channel import LocalChannel
from services.runtime.large_result import LargeAnswer


class Begins(Protocol):
    """A connection that sends envelopes."""

    def begin(self, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]) -> Callable[[], object]:
        """As `Channel.begin`, for an envelope."""


class Channel(Protocol):
    """Unary gRPC calls to one worker; router/transport/grpc_channel.py documents the methods."""

    def begin(
        self, method: str, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]
    ) -> Callable[[], object]:
        """Starts a call; returns a cancel function."""

    async def call(self, method: str, request: bytes) -> bytes:
        """The serialized response. Raises CallError."""

    def is_local(self, port: int) -> bool:
        """Whether the server is on this host, at `port`."""

    async def ping(self, seconds: float) -> bool:
        """Whether the server's engine answers within `seconds`."""

    def drop(self) -> None:
        """Disconnects; calls under way fail, and the next call connects again."""

    async def close(self) -> None:
        """As `drop`, but permanently."""


class LocalWay(Protocol):
    """Envelopes over a Unix socket on this host; router/transport/local_channel.py documents the methods."""

    def connection(self) -> Begins | None:
        """The connection for envelopes; None if there is none now, and the channel must be used."""

    async def use(self, path: str) -> None:
        """Connects to the socket at `path`."""

    def drop(self) -> None:
        """Closes the connection; envelopes under way fail."""

    def close(self) -> None:
        """As `drop`, but permanently."""


class Channels(Protocol):
    """Makes the channels of links."""

    def channel(self, address: str) -> Channel:
        """A channel to the worker at host:port."""

    def local(self) -> LocalWay:
        """A local channel to a worker on this host, unconnected until the worker names its socket."""


class Network:
    """Real connections."""

    def channel(self, address: str) -> Channel:
        """A gRPC channel to the worker at host:port."""
        return GrpcChannel(address)

    def local(self) -> LocalWay:
        """A channel over a Unix socket."""
        return LocalChannel()


NETWORK: Final[Channels] = Network()
