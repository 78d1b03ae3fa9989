"""What a handler of the native engine knows of its call, and may do with it: as grpc.aio's ServicerContext."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc

from services.runtime.rpc.http2_connection import Stream
from services.runtime.rpc.request_head import headers
from services.runtime.rpc.rpc import Metadata

log = logging.getLogger(__name__)

# What may wait of a streamed answer before more of it is made.
_UNSENT_BYTES = 64 << 10


class CallContext:
    """One call, with the methods of grpc.aio.ServicerContext."""

    def __init__(self, stream: Stream, deadline: float | None) -> None:
        self._stream = stream
        self._deadline = deadline
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: Metadata = ()
        # Of a method with one answer, until that is sent.
        self.initial: Metadata = ()
        self._is_done = False
        self._callbacks: list[Callable[[Any], None]] = []

    async def read(self) -> NoReturn:
        """Handlers get an iterator instead."""
        raise RuntimeError("iterate over the requests")

    async def write(self, message: bytes) -> None:
        """Sends a message, when the client has taken most of those before."""
        stream = self._stream
        stream.connection.send(stream, message)
        while stream.unsent_bytes > _UNSENT_BYTES:
            stream.drained = asyncio.get_running_loop().create_future()
            await stream.drained

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        self.initial = initial_metadata
        method = self._stream.head.method
        if method is not None and method.is_streamed:
            self._stream.connection.open(self._stream, headers(initial_metadata))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self._code = code if code is not grpc.StatusCode.OK else grpc.StatusCode.UNKNOWN
        self._details = details
        if trailing_metadata:
            self._trailing = trailing_metadata
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._trailing = trailing_metadata

    def trailing_metadata(self) -> Metadata:
        return self._trailing

    def invocation_metadata(self) -> Metadata:
        metadata: Metadata = self._stream.head.metadata
        return metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> str:
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Answers are not compressed."""

    def disable_next_message_compression(self) -> None:
        """Answers are not compressed."""

    def peer(self) -> str:
        return self._stream.connection.peer

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def cancelled(self) -> bool:
        return self._stream.is_closed and not self._is_done

    def done(self) -> bool:
        return self._is_done

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._is_done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def finish(self) -> None:
        """The call is over."""
        self._is_done = True
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a callback at the end of a call failed")


async def deserialized(messages: AsyncIterator[bytes], deserialize: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """Yields the messages of a request stream."""
    async for message in messages:
        yield deserialize(message)
