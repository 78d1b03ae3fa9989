"""A connection to the Unix socket at which a local worker takes envelopes. Format: services/runtime/frames.py."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import grpc

from router.transport.grpc_channel import CallError, code_of, taken_apart
from services.runtime import faults
from services.runtime.frames import ANSWER, CALL, CANCEL, FAILURE, LEAVING, PART, FrameError, Frames
from services.runtime.large_result import LargeAnswer, take_apart

log = logging.getLogger(__name__)

# Call numbers have 32 bits.
_MAX_NUMBER = 2**32 - 1


class LocalConnection(Frames):
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
        """Whether another envelope may be sent on this connection."""
        return self.transport is not None and not self._leaving

    def begin(self, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]) -> Callable[[], object]:
        """Sends an envelope and returns a cancel function.

        Calls `done` after it has returned, with the serialized response (split if it is large) or an error. The cancel
        function also informs the worker; `done` is then not called.
        """
        number = self._next
        self._next += 1
        if self._next == _MAX_NUMBER:
            self._leaving = True
        self._under_way[number] = done
        self.send(CALL, number, request)
        return partial(self._cancel, number)

    def close(self) -> None:
        """Aborts the connection; envelopes under way fail."""
        self._leaving = True
        if self.transport is not None:
            self.transport.abort()

    def take(self, kind: int, number: int, payload: bytes) -> None:
        """Handles a frame from the worker."""
        if kind == PART:
            if number in self._under_way:  # else it was cancelled
                self._parts.setdefault(number, []).append(payload)
        elif kind == ANSWER and (parts := self._parts.pop(number, None)) is not None:
            parts.append(payload)
            taking = asyncio.get_running_loop().run_in_executor(None, take_apart, parts)
            taking.add_done_callback(partial(self._taken_apart, number))
        elif kind == ANSWER:
            self._end(number, payload)
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

    def _taken_apart(self, number: int, taking: asyncio.Future[LargeAnswer]) -> None:
        self._end(number, taken_apart(taking))

    def _end(self, number: int, answer: bytes | LargeAnswer | CallError) -> None:
        done = self._under_way.pop(number, None)
        if done is not None:  # else it was cancelled
            done(answer)
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._leaving and not self._under_way and self.transport is not None:
            self.transport.close()
