"""Fast paths on the native engine: calls without asyncio tasks, most of them answered on the receiving thread.

pygrpc-native's asyncio server makes a task and a context for every call, about as much work as a cache hit itself.
Here each call of a batch starts its coroutine on the receiving thread. If it ends there, it is answered there. The
suspended calls of a batch go to the event loop in one wake-up. Measured in docs/performance.md.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeAlias

import grpc
import pygrpc_native.aio as native  # in 0.5.0, `from pygrpc_native import aio` recurses without end
from pygrpc_native import EVENT_CALL, EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL, NativeGrpcFront

from services.runtime import faults
from services.runtime.driver import Driver
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.machine import cores
from services.runtime.rpc.access import Guard
from services.runtime.rpc.backlog import MAX_UNREAD_BYTES, Backlog
from services.runtime.rpc.rpc import (
    PUSHBACK,
    Answer,
    Failure,
    FastPath,
    Metadata,
    check_metadata,
    failure,
    status_details,
)

log = logging.getLogger(__name__)

_BATCH = 64
_NO_GUARDS: Mapping[str, Guard | None] = {}
_FLUSH_SECONDS = 0.1
# Delay of `afterwards` callbacks, to batch them: a wake-up and a GIL hand-over cost more than most of these callbacks.
_AFTERWARDS_SECONDS = 0.02
# First and longest pause before a retry on a stream whose client does not read.
_RETRY_SECONDS = 0.001
_LONGEST_RETRY_SECONDS = 0.05
# A call that waits for the event loop: its coroutine, its id, its deadline in time.monotonic, and the caller's address.
_Suspended: TypeAlias = "tuple[Coroutine[Any, Any, Answer | Failure], int, float | None, str]"


class FastPathServer(native.Server):
    """`pygrpc_native.aio.server()` with fast paths by method. It uses private names of it, which tests pin."""

    def __init__(
        self,
        options: list[tuple[str, Any]],
        paths: Mapping[str, FastPath],
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        guards: Mapping[str, Guard | None] = _NO_GUARDS,
    ) -> None:
        """`guards`: checks of the callers of fast paths; they raise RingmeshError."""
        # On two cores, a second I/O thread would only compete with Python.
        super().__init__(options=options, io_threads=min(2, max(1, cores.available() // 2)))
        # The engine's metrics report the calls that have ended, and the bytes that they sent.
        self._front_args["metrics"] = True
        self.backlog = Backlog(max_unread_bytes, self._ended_bytes)
        self._unary: frozenset[str] = frozenset()
        self._paths = paths
        self._largest = self._receive_limit if self._receive_limit is not None else sys.maxsize
        self._path_of: list[FastPath | None] = []
        self._guards = guards
        self._guard_of: list[Guard | None] = []
        self._draining = False
        # Pending `afterwards` callbacks, and whether the event loop is scheduled to run them.
        self._afterwards: deque[Callable[[], None]] = deque()
        self._is_scheduled = False
        # Cancel functions of the fast-path calls in flight, by call id.
        self._under_way: dict[int, Callable[[], object]] = {}
        # Set while the server stops, when no such call is left.
        self._idle = asyncio.Event()
        # CPU time of the receiving thread.
        self.receiver_seconds = 0.0

    async def start(self) -> None:
        await super().start()
        self._path_of = [self._paths.get(path) for path, _ in self._table]
        self._guard_of = [self._guards.get(path) for path, _ in self._table]
        self._unary = frozenset(path for path, handler in self._table if not handler.response_streaming)

    async def stop(self, grace: float | None) -> None:
        """Refuses new calls, waits for those in flight, and closes after their answers are sent."""
        self._draining = True
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if self._fallback is not None:
            tasks.append(asyncio.create_task(self._fallback.stop(grace)))
        tasks.append(asyncio.create_task(self._be_idle()))
        await asyncio.wait(tasks, timeout=grace or 0)
        tasks[-1].cancel()
        # Closing drops data that the engine has not yet written to its sockets; it offers no way to wait for that.
        await asyncio.sleep(_FLUSH_SECONDS)
        for call_id, cancel in list(self._under_way.items()):
            cancel()
            self._end(call_id, "", Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ()))
        await super().stop(0)

    async def _be_idle(self) -> None:
        if self._under_way:
            await self._idle.wait()

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        super()._on_events(events)
        for kind, call_id, *_ in events:
            # The engine forgets a call at the end of its task, which does not run if the caller left in the same batch.
            if kind == EVENT_CALL and (call := self._calls.get(call_id)) is not None and call.task is not None:
                call.task.add_done_callback(partial(self._forget, call_id))

    def _forget(self, call_id: int, _: asyncio.Task[None]) -> None:
        self._calls.pop(call_id, None)

    def _fail(self, call: Any, context: Any, details: str | None) -> None:
        context._trailing_metadata = _sendable(context._trailing_metadata)
        super()._fail(call, context, details)

    def _ended_bytes(self) -> tuple[int, bool]:
        """Returns the bytes of unary answers that were sent or whose callers left, and whether no such call is open."""
        front = self._front
        methods = (front.metrics() or {}).get("methods", {}) if front is not None else {}
        unary = [method for path, method in methods.items() if path in self._unary]
        ended = [status for method in unary for status in method["status"].values()]
        is_idle = sum(method["started"] for method in unary) == sum(status["count"] for status in ended)
        return sum(status["sent"]["sum"] for status in ended), is_idle

    async def _run_unary(self, call: Any, context: Any, request: Any) -> None:
        ok, response = await self._unary_response(call, context, request)
        data = self._encode(call, context, response) if ok else None
        if data is not None:
            initial = None if context._initial_metadata is None else list(context._initial_metadata)
            self._respond(call.call_id, call.peer, data, list(context._trailing_metadata), initial)

    def _respond(
        self, call_id: int, peer: str, body: bytes, trailing: Metadata, initial: Metadata | None = None
    ) -> None:
        front, backlog = self._front, self.backlog
        assert front is not None
        if not backlog.admit(peer, len(body)):
            refused = backlog.refusal()
            self._refuse(call_id, refused.code, refused.message, status_details(refused))
            return
        is_taken = False
        try:
            is_taken = front.respond(call_id, body, initial, trailing)
        except Exception as error:
            self._refuse_as_fault(call_id, error)
        finally:
            if not is_taken:
                backlog.withdraw(peer, len(body))

    def _refuse(self, call_id: int, code: grpc.StatusCode, message: str, trailing: Metadata) -> None:
        front = self._front
        assert front is not None
        try:
            front.fail(call_id, code.value[0], message, trailing_metadata=_sendable(trailing))
        except Exception as error:
            self._refuse_as_fault(call_id, error)

    def _refuse_as_fault(self, call_id: int, error: Exception) -> None:
        """Ends a call whose answer the engine does not take, such as one with metadata that gRPC does not allow. The
        caller would wait for ever, and an exception would end the receiving thread."""
        front = self._front
        assert front is not None
        fault = faults.internal(log, "an answer could not be sent", error)
        front.fail(call_id, fault.code.value[0], fault.message)

    def _answer(self, call_id: int, peer: str, answer: Answer | Failure) -> None:
        if isinstance(answer, Answer):
            self._respond(call_id, peer, answer.body, answer.trailing)
        else:
            self._refuse(call_id, answer.code, answer.message, answer.trailing)

    async def _send(self, call: Any, context: Any, response: Any) -> bool:
        # The engine's own send blocks one of the process's few threads for each client that does not read.
        front = self._front
        assert front is not None
        data = self._encode(call, context, response)
        if data is None:
            return False
        context._initial_sent = True
        pause = _RETRY_SECONDS
        while (sent := await self._try_send(front, call.call_id, data)) == STREAM_FULL:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
        return bool(sent != STREAM_CLOSED)

    @staticmethod
    async def _try_send(front: NativeGrpcFront, call_id: int, data: bytes) -> Any:
        if len(data) > LARGE_BYTES:
            return await asyncio.to_thread(front.stream_try_send, call_id, data)
        return front.stream_try_send(call_id, data)

    def _dispatch(self) -> None:
        """Runs on the engine's receiving thread: a hit answered here saves this thread and the event loop a wake-up."""
        front, loop = self._front, self._loop
        assert front is not None
        assert loop is not None
        while (events := front.recv_batch_details(_BATCH)) is not None:
            suspended, rest = self._start_fast_paths(events)
            self.receiver_seconds = time.thread_time()
            try:
                if suspended or rest:
                    loop.call_soon_threadsafe(self._take, suspended, rest)
                if self._afterwards and not self._is_scheduled:
                    self._is_scheduled = True
                    loop.call_soon_threadsafe(loop.call_later, _AFTERWARDS_SECONDS, self._do_afterwards)
            except RuntimeError:
                # The event loop was closed without a call of stop().
                for coroutine, *_ in suspended:
                    coroutine.close()
                front.close()
                return

    def _start_fast_paths(self, events: list[tuple[Any, ...]]) -> tuple[list[_Suspended], list[tuple[Any, ...]]]:
        """Answers calls that end here; returns calls that continue on the event loop, and events without fast path."""
        suspended: list[_Suspended] = []
        rest = []
        paths, largest = self._path_of, self._largest
        now = time.monotonic()
        for event in events:
            kind, call_id, method_id, payload, _, details = event
            path = paths[method_id] if kind == EVENT_CALL and paths else None
            if path is None or self._draining or len(payload) > largest:
                rest.append(event)
                continue
            metadata, peer, remaining = details
            answer: Answer | Failure
            try:
                check_metadata(metadata)
                if (guard := self._guard_of[method_id]) is not None:
                    guard(metadata, peer, payload)
                deadline = None if remaining is None else now + remaining
                coroutine = path(payload, metadata, deadline)
                coroutine.send(None)
            except StopIteration as end:
                answer = end.value
            except Exception as error:
                answer = failure(faults.reported(log, "a fast path failed", error))
            else:
                suspended.append((coroutine, call_id, deadline, peer))
                continue
            if isinstance(answer, Answer) and answer.is_large:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._send_large, call_id, peer, answer)
                continue
            self._answer(call_id, peer, answer)
            if answer.afterwards is not None:
                self._afterwards.append(answer.afterwards)
        return suspended, rest

    def _do_afterwards(self) -> None:
        """Runs callbacks in batches, to block neither the event loop nor, by the GIL, the receiving thread for long."""
        assert self._loop is not None
        for _ in range(_BATCH):
            if not self._afterwards:
                # Cleared before the check below, so that a callback added in between is scheduled again.
                self._is_scheduled = False
                break
            _do_afterwards(self._afterwards.popleft())
        if self._afterwards:
            self._is_scheduled = True
            self._loop.call_soon(self._do_afterwards)

    def _take(self, suspended: list[_Suspended], events: list[tuple[Any, ...]]) -> None:
        """Continues suspended calls and handles other events; runs on the event loop."""
        front = self._front
        assert front is not None
        if self._draining:
            for coroutine, call_id, _, _ in suspended:
                coroutine.close()
                front.fail(call_id, grpc.StatusCode.UNAVAILABLE.value[0], "the server is draining")
            for event in events:
                if event[0] == EVENT_CALL:
                    front.fail(event[1], grpc.StatusCode.UNAVAILABLE.value[0], "the server is draining")
            suspended, events = [], [event for event in events if event[0] != EVENT_CALL]
        for coroutine, call_id, deadline, peer in suspended:
            driver = Driver(coroutine, partial(self._end, call_id, peer))
            self._under_way[call_id] = driver.cancel
            driver.start(deadline)
        if events:
            for event in events:
                # Remove the call here: a coroutine cancelled before it starts never reaches `_end`.
                if event[0] == EVENT_CANCEL and (cancel := self._ended(event[1])) is not None:
                    cancel()
            self._on_events(events)

    def _end(self, call_id: int, peer: str, outcome: Answer | Failure | BaseException) -> None:
        if isinstance(outcome, asyncio.CancelledError):
            # `stop` cancelled it: if the caller had left, the call would be removed already.
            outcome = Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ())
        elif isinstance(outcome, Exception):
            outcome = failure(faults.reported(log, "a fast path failed", outcome))
        assert isinstance(outcome, Answer | Failure)
        if isinstance(outcome, Answer) and outcome.is_large and call_id in self._under_way:
            self._send_large(call_id, peer, outcome)
            return
        if self._ended(call_id) is not None and self._front is not None:
            self._answer(call_id, peer, outcome)
        _do_afterwards(outcome.afterwards)

    def _send_large(self, call_id: int, peer: str, answer: Answer) -> None:
        """Sends on a thread: the engine copies the answer, which takes long, though without the GIL."""
        assert self._loop is not None
        # Not cancelled when the caller leaves; the engine drops the answer then.
        self._under_way[call_id] = _nothing
        sending = self._loop.run_in_executor(None, self._send_whole, call_id, peer, answer)
        sending.add_done_callback(partial(self._sent_large, call_id, answer))

    def _send_whole(self, call_id: int, peer: str, answer: Answer) -> None:
        if self._front is None:
            return
        try:
            self._respond(call_id, peer, answer.whole(), answer.trailing)
        except Exception as error:  # no memory for the whole
            self._refuse_as_fault(call_id, error)

    def _sent_large(self, call_id: int, answer: Answer, _: asyncio.Future[None]) -> None:
        self._ended(call_id)
        _do_afterwards(answer.afterwards)

    def _ended(self, call_id: int) -> Callable[[], object] | None:
        """Removes a call and returns its cancel function; None if it has ended before."""
        cancel = self._under_way.pop(call_id, None)
        if self._draining and not self._under_way:
            self._idle.set()
        return cancel


def _sendable(trailing: Metadata) -> Metadata:
    # The engine reserves names that begin with grpc-; RetryInfo in the details carries the same value.
    return [pair for pair in trailing if pair[0] != PUSHBACK]


def _do_afterwards(callback: Callable[[], None] | None) -> None:
    if callback is not None:
        try:
            callback()
        except Exception as error:
            faults.internal(log, "the work after an answer failed", error)


def _nothing() -> None:
    """The cancel function of a call that cannot be cancelled."""
