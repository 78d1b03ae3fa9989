"""How a link reaches its worker: what it needs of a channel, so that a simulation can put its own network beneath."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable
from typing import Final, Protocol

from router.transport.grpc_channel import CallError, GrpcChannel
from router.transport.local_channel import LocalChannel
from services.runtime.large_result import LargeAnswer


class Begins(Protocol):
    """Something that takes envelopes."""

    def begin(self, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]) -> Callable[[], object]:
        """As `Channel.begin`, of an envelope."""


class Channel(Protocol):
    """Unary gRPC calls to one worker: router/transport/grpc_channel.py says how each method behaves."""

    def begin(
        self, method: str, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]
    ) -> Callable[[], object]:
        """A call; returns what cancels it."""

    async def call(self, method: str, request: bytes) -> bytes:
        """The serialized response. Raises CallError."""

    def is_local(self, port: int) -> bool:
        """Whether the server is on this host, at `port`."""

    async def ping(self, seconds: float) -> bool:
        """Whether the server's engine answers within `seconds`."""

    def drop(self) -> None:
        """Disconnects; what is under way fails, and the next call connects again."""

    async def close(self) -> None:
        """As `drop`, for good."""


class LocalWay(Protocol):
    """Envelopes over a Unix socket of this host: router/transport/local_channel.py says how each method behaves."""

    def connection(self) -> Begins | None:
        """Where an envelope may be sent now; None: over the channel."""

    async def use(self, path: str) -> None:
        """Connects to the socket there."""

    def drop(self) -> None:
        """Ends the connection with all that is under way."""

    def close(self) -> None:
        """As `drop`, for good."""


class Channels(Protocol):
    """Makes the channels of links."""

    def channel(self, address: str) -> Channel:
        """To the worker at host:port."""

    def local(self) -> LocalWay:
        """To a worker of this host, once it names its socket."""


class Network:
    """Real connections."""

    def channel(self, address: str) -> Channel:
        """From Channels."""
        return GrpcChannel(address)

    def local(self) -> LocalWay:
        """From Channels."""
        return LocalChannel()


NETWORK: Final[Channels] = Network()
