"""Envelopes to a worker on this host, over the Unix socket that it names. Format: services/runtime/frames.py."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import grpc

from router.transport.grpc_channel import CONNECT_SECONDS, CallError, code_of, deliver
from services.runtime import faults
from services.runtime.frames import ANSWER, CALL, CANCEL, FAILURE, LEAVING, PART, FrameConnection, FrameError
from services.runtime.large_result import LargeAnswer

log = logging.getLogger(__name__)

# Call numbers have 32 bits.
_MAX_NUMBER = 2**32 - 1


class LocalConnection(FrameConnection):
    """A connection for many concurrent envelopes."""

    def __init__(self) -> None:
        super().__init__(_MAX_NUMBER)
        self._under_way: dict[int, Callable[[bytes | LargeAnswer | CallError], None]] = {}
        # The parts of large answers received so far.
        self._parts: dict[int, list[bytes]] = {}
        self._next = 0
        self._leaving = False

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self._leaving

    def begin(
        self, request: Sequence[bytes], done: Callable[[bytes | LargeAnswer | CallError], None]
    ) -> Callable[[], object]:
        """Sends an envelope, given in pieces, and returns a cancel function.

        Calls `done` after it has returned, with the serialized response (split if it is large) or an error. The cancel
        function also informs the worker; `done` is then not called.
        """
        number = self._next
        self._next += 1
        if self._next == _MAX_NUMBER:
            self._leaving = True
        self._under_way[number] = done
        self.send_pieces(CALL, number, request)
        return partial(self._cancel, number)

    def close(self) -> None:
        self._leaving = True
        if self.transport is not None:
            self.transport.abort()

    def take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == PART:
            if number in self._under_way:  # else it was cancelled
                self._parts.setdefault(number, []).append(payload)
        elif kind == ANSWER:
            deliver([*self._parts.pop(number, ()), payload], partial(self._end, number))
        elif kind == FAILURE and payload:
            self._end(number, CallError(code_of(payload[0]), payload[1:].decode(errors="replace")))
        elif kind == LEAVING:
            self._leaving = True
            self._close_if_done()
        else:
            raise FrameError(f"the worker broke the protocol with a frame of kind {kind}")

    def ended(self, why: str) -> None:
        """Fails all envelopes under way: the connection has ended."""
        self._leaving = True
        under_way, self._under_way = self._under_way, {}
        self._parts.clear()
        for done in under_way.values():
            try:
                done(CallError(grpc.StatusCode.UNAVAILABLE, why, lost=True))
            except Exception as error:
                faults.internal(log, "an envelope was lost", error)

    def _cancel(self, number: int) -> None:
        if self._under_way.pop(number, None) is not None:
            self._parts.pop(number, None)
            self.send(CANCEL, number)
            self._close_if_done()

    def _end(self, number: int, answer: bytes | LargeAnswer | CallError) -> None:
        done = self._under_way.pop(number, None)
        if done is not None:  # else it was cancelled
            done(answer)
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._leaving and not self._under_way and self.transport is not None:
            self.transport.close()


class LocalChannel:
    """Keeps a connection to the socket. There is none before `use`, and none while it reconnects after a loss."""

    def __init__(self) -> None:
        self._path = ""
        self._connection: LocalConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False

    def connection(self) -> LocalConnection | None:
        """The open connection, if any. Starts to reconnect if it was lost."""
        if self._connection is not None and not self._connection.is_open:
            self._connection = None
            self._connect(self._path)
        return self._connection

    async def use(self, path: str) -> None:
        """Connects to the socket at `path`, if it is not connected. A failure is ignored."""
        if not self._closed and (self._connection is None or not self._connection.is_open):
            await asyncio.wait([self._connect(path)])

    def drop(self) -> None:
        """Closes the connection; envelopes under way fail. The next `use` connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """As `drop`, but permanently."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self.drop()

    def _connect(self, path: str) -> asyncio.Task[None]:
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connected(path))
        return self._connecting

    async def _connected(self, path: str) -> None:
        with suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(CONNECT_SECONDS):
                _, made = await asyncio.get_running_loop().create_unix_connection(LocalConnection, path)
            self._connection, self._path = made, path
