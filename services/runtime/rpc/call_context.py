"""Calls of the native engine that run in a task: their handler, and what it knows of its call and may do with it.

Not compiled: mypyc loses a reference where an exception is thrown into `async with` or `async for`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

import grpc

from services.runtime.errors import RingmeshError
from services.runtime.rpc.access import Guard
from services.runtime.rpc.http2_connection import UNSENT_BYTES, Stream
from services.runtime.rpc.http2_frames import CANCEL
from services.runtime.rpc.request_head import failed, headers, trailers
from services.runtime.rpc.rpc import FastPath, Handler, Metadata, status_details

log = logging.getLogger(__name__)


class Method:
    """What is at a path: a handler, its fast path and the guard of that."""

    def __init__(self, handler: Handler, path: FastPath | None, guard: Guard | None) -> None:
        parts: Any = handler
        self.path = path
        self.guard = guard
        self.takes_stream: bool = parts.request_streaming
        self.is_streamed: bool = parts.response_streaming
        kinds = (parts.unary_unary, parts.unary_stream, parts.stream_stream)
        self.answer: Any = next(answer for answer in kinds if answer is not None)
        self.deserialize: Any = parts.request_deserializer
        self.serialize: Any = parts.response_serializer


class Answering(Protocol):
    """How a server answers."""

    def respond(
        self, stream: Stream, body: tuple[bytes, ...], trailing: Metadata, initial: Metadata | None = None
    ) -> None:
        """Answers with one message, in pieces."""

    def refuse(self, stream: Stream, code: grpc.StatusCode, message: str, trailing: Metadata) -> None:
        """Ends a call with a status."""

    def refuse_as_fault(self, stream: Stream, error: Exception) -> None:
        """Ends a call because of an error that nobody expected."""


class CallContext:
    """One call, with the methods of grpc.aio.ServicerContext."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
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
        while stream.unsent_bytes > UNSENT_BYTES:
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
        deadline = self._stream.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

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


async def run(answering: Answering, stream: Stream, method: Method, message: bytes, context: CallContext) -> None:
    """Runs the handler of a call and answers it."""
    try:
        request: Any = stream.messages
        if request is None:
            request = message if method.deserialize is None else method.deserialize(message)
        elif method.deserialize is not None:
            request = _deserialized(request, method.deserialize)
        if method.is_streamed:
            await _run_stream(stream, method, request, context)
            return
        response = await method.answer(request, context)
        body: bytes = response if method.serialize is None else method.serialize(response)
        if context.code() in (None, grpc.StatusCode.OK):
            answering.respond(stream, (body,), context.trailing_metadata(), context.initial)
            return
    except asyncio.CancelledError:
        # The client has left, or it did not read; if it is there, it has to know. A status that waits is enough,
        # unless it waits behind data.
        if stream.is_open and stream.trailers is not None and not stream.unsent:
            raise
        if stream.is_open:
            stream.connection.reset(stream, CANCEL)
        else:
            stream.connection.fail(stream, grpc.StatusCode.CANCELLED, "the call was cancelled")
        raise
    except grpc.aio.AbortError:
        pass
    except RingmeshError as error:
        answering.refuse(stream, error.code, error.message, status_details(error))
        return
    except Exception as error:
        answering.refuse_as_fault(stream, error)
        return
    answering.refuse(stream, context.code() or grpc.StatusCode.UNKNOWN, context.details(), context.trailing_metadata())


async def _run_stream(stream: Stream, method: Method, request: Any, context: CallContext) -> None:
    async with aclosing(method.answer(request, context)) as responses:
        async for response in responses:
            if stream.is_closed:
                return
            await context.write(response if method.serialize is None else method.serialize(response))
    code = context.code()
    if code is None or code is grpc.StatusCode.OK:
        stream.connection.end(stream, trailers(context.trailing_metadata()))
    else:
        stream.connection.end(stream, failed(code, context.details(), context.trailing_metadata()))


async def _deserialized(messages: AsyncIterator[bytes], deserialize: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for message in messages:
        yield deserialize(message)
