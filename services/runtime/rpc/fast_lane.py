"""A lane for calls that can be answered at once, on the native engine.

pygrpc-native's asyncio server makes a task and a context for every call, about as much work as a cache hit itself.
Here a batch of calls is first offered to a plain function, on the thread that takes them from the engine; what that
answers is sent there and then, and the rest goes to the event loop in one wake-up. Measured in docs/performance.md.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import grpc
import pygrpc_native.aio as native  # in 0.5.0, `from pygrpc_native import aio` recurses without end
from pygrpc_native import EVENT_CALL, EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL, NativeGrpcFront

from services.runtime import faults
from services.runtime.errors import RingmeshError
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.machine import cores
from services.runtime.rpc.backlog import MAX_UNREAD_BYTES, Backlog
from services.runtime.rpc.rpc import PUSHBACK, Answer, Failure, Lane, Metadata, check_metadata, failure, status_details

log = logging.getLogger(__name__)

_BATCH = 64
_FLUSH_SECONDS = 0.1
# What answers leave to be done waits so long: a wake-up, and a change of the GIL's holder, costs more than most of it.
_AFTERWARDS_SECONDS = 0.02
# How soon, and at least how often, a stream whose client does not read is tried again.
_RETRY_SECONDS = 0.001
_LONGEST_RETRY_SECONDS = 0.05
# The lane, the call's id, what is to be finished, the seconds that the caller has left, and the caller.
_Admitted: TypeAlias = tuple[Lane, int, Any, float | None, str]


class FastLaneServer(native.Server):
    """`pygrpc_native.aio.server()` with lanes by method path, on some of its private names that our tests hold."""

    def __init__(
        self, options: list[tuple[str, Any]], lanes: Mapping[str, Lane], max_unread_bytes: int = MAX_UNREAD_BYTES
    ) -> None:
        # On two cores a second one only takes turns with Python.
        super().__init__(options=options, io_threads=min(2, max(1, cores.available() // 2)))
        # They say what was sent of calls that have ended.
        self._front_args["metrics"] = True
        self.backlog = Backlog(max_unread_bytes, self._sent_bytes)
        self._unary: frozenset[str] = frozenset()
        self._lanes = lanes
        self._largest = self._receive_limit if self._receive_limit is not None else sys.maxsize
        self._lane_of: list[Lane | None] = []
        self._draining = False
        # What answers leave to be done, until the event loop is told.
        self._afterwards: deque[Callable[[], None]] = deque()
        self._is_told = False
        # What cancels the calls that `start` or `finish` is at, by id.
        self._under_way: dict[int, Callable[[], object]] = {}
        # Of a server that stops: none of them is left.
        self._idle = asyncio.Event()
        # CPU time of the lanes' thread.
        self.lane_seconds = 0.0

    async def start(self) -> None:
        """Serves."""
        await super().start()
        self._lane_of = [self._lanes.get(path) for path, _ in self._table]
        self._unary = frozenset(path for path, handler in self._table if not handler.response_streaming)

    async def stop(self, grace: float | None) -> None:
        """Turns new calls away, waits for those under way, and closes only when their answers have left."""
        self._draining = True
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if self._fallback is not None:
            tasks.append(asyncio.create_task(self._fallback.stop(grace)))
        tasks.append(asyncio.create_task(self._be_idle()))
        await asyncio.wait(tasks, timeout=grace or 0)
        tasks[-1].cancel()
        # Closing takes with it what the engine has not yet written to its sockets; it has no way to wait for that.
        await asyncio.sleep(_FLUSH_SECONDS)
        for call_id, cancel in list(self._under_way.items()):
            cancel()
            self._end(call_id, "", Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ()))
        # The tasks among them hear of it.
        await asyncio.sleep(0)
        await super().stop(0)

    async def _be_idle(self) -> None:
        if self._under_way:
            await self._idle.wait()

    def _fail(self, call: Any, context: Any, details: str | None) -> None:
        context._trailing_metadata = _sendable(context._trailing_metadata)
        super()._fail(call, context, details)

    def _sent_bytes(self) -> int:
        """Bytes of unary answers that have left, or whose callers left first."""
        front = self._front
        methods = (front.metrics() or {}).get("methods", {}) if front is not None else {}
        return sum(
            status["sent"]["sum"]
            for path, method in methods.items()
            if path in self._unary
            for status in method["status"].values()
        )

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
            front.fail(
                call_id, refused.code.value[0], refused.message, trailing_metadata=_sendable(status_details(refused))
            )
        elif not front.respond(call_id, body, initial, trailing):
            backlog.withdraw(peer, len(body))

    def _answer(self, call_id: int, peer: str, answer: Answer | Failure) -> None:
        front = self._front
        assert front is not None
        if isinstance(answer, Answer):
            self._respond(call_id, peer, answer.body, answer.trailing)
        else:
            front.fail(call_id, answer.code.value[0], answer.message, trailing_metadata=_sendable(answer.trailing))

    async def _send(self, call: Any, context: Any, response: Any) -> bool:
        # The engine would hold one of the process's few threads for each client that does not read.
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
        """On the engine's receiving thread: a hit answered here spares it and the event loop a wake-up each."""
        front, loop = self._front, self._loop
        assert front is not None
        assert loop is not None
        while (events := front.recv_batch_details(_BATCH)) is not None:
            admitted, rest = self._answer_at_once(events)
            self.lane_seconds = time.thread_time()
            try:
                if admitted or rest:
                    loop.call_soon_threadsafe(self._take, admitted, rest)
                if self._afterwards and not self._is_told:
                    self._is_told = True
                    loop.call_soon_threadsafe(loop.call_later, _AFTERWARDS_SECONDS, self._do_afterwards)
            except RuntimeError:
                # The loop was closed without stop().
                front.close()
                return

    def _answer_at_once(self, events: list[tuple[Any, ...]]) -> tuple[list[_Admitted], list[tuple[Any, ...]]]:
        """What is left to be finished, and what had no lane."""
        admitted: list[_Admitted] = []
        rest = []
        lanes, largest = self._lane_of, self._largest
        loop = self._loop
        assert loop is not None
        for event in events:
            kind, call_id, method_id, payload, _, details = event
            lane = lanes[method_id] if kind == EVENT_CALL and lanes else None
            if lane is None or self._draining or len(payload) > largest:
                rest.append(event)
                continue
            try:
                check_metadata(details[0])
                answer = lane.admit(payload, details[0])
            except RingmeshError as error:
                answer = failure(error)
            except Exception as error:
                answer = failure(faults.internal(log, "a lane failed", error))
            if type(answer) is not Answer and type(answer) is not Failure:
                admitted.append((lane, call_id, answer, details[2], details[1]))
                continue
            if isinstance(answer, Answer) and answer.is_large:
                loop.call_soon_threadsafe(self._send_large, call_id, details[1], answer)
                continue
            self._answer(call_id, details[1], answer)
            if answer.afterwards is not None:
                self._afterwards.append(answer.afterwards)
        return admitted, rest

    def _do_afterwards(self) -> None:
        """Some of it at a time, so that it holds up neither the event loop nor, by the GIL, the lanes."""
        assert self._loop is not None
        for _ in range(_BATCH):
            if not self._afterwards:
                # In this order: what comes between the two is told again.
                self._is_told = False
                break
            try:
                self._afterwards.popleft()()
            except Exception as error:
                faults.internal(log, "what an answer left to be done failed", error)
        if self._afterwards:
            self._is_told = True
            self._loop.call_soon(self._do_afterwards)

    def _take(self, admitted: list[_Admitted], events: list[tuple[Any, ...]]) -> None:
        """On the event loop."""
        front, loop = self._front, self._loop
        assert front is not None
        assert loop is not None
        if self._draining:
            for call_id in [call[1] for call in admitted] + [event[1] for event in events if event[0] == EVENT_CALL]:
                front.fail(call_id, grpc.StatusCode.UNAVAILABLE.value[0], "the server is draining")
            admitted, events = [], [event for event in events if event[0] != EVENT_CALL]
        for lane, call_id, call, remaining, peer in admitted:
            deadline = None if remaining is None else time.monotonic() + remaining
            self._begin(lane, call_id, call, deadline, peer)
        if events:
            for event in events:
                # It may not have begun, and then would not come to its end either.
                if event[0] == EVENT_CANCEL and (cancel := self._ended(event[1])) is not None:
                    cancel()
            self._on_events(events)

    def _begin(self, lane: Lane, call_id: int, call: object, deadline: float | None, peer: str) -> None:
        self._under_way[call_id] = _nothing
        if lane.start is not None:
            try:
                cancel = lane.start(call, deadline, partial(self._end, call_id, peer))
            except Exception as error:
                self._end(call_id, peer, failure(faults.internal(log, "a lane failed", error)))
                return
            if cancel is not None:
                # Unless it has ended by now.
                if call_id in self._under_way:
                    self._under_way[call_id] = cancel
                return
        assert self._loop is not None
        task = self._loop.create_task(self._finish(lane, call_id, call, deadline, peer))
        self._under_way[call_id] = task.cancel

    async def _finish(self, lane: Lane, call_id: int, call: object, deadline: float | None, peer: str) -> None:
        try:
            answer = await lane.finish(call, deadline)
        except asyncio.CancelledError:
            return
        except Exception as error:
            answer = failure(faults.internal(log, "a lane failed", error))
        self._end(call_id, peer, answer)

    def _end(self, call_id: int, peer: str, answer: Answer | Failure) -> None:
        if isinstance(answer, Answer) and answer.is_large and call_id in self._under_way:
            self._send_large(call_id, peer, answer)
            return
        if self._ended(call_id) is not None and self._front is not None:
            self._answer(call_id, peer, answer)
        _do_afterwards(answer)

    def _send_large(self, call_id: int, peer: str, answer: Answer) -> None:
        """From a thread: the engine copies it, which takes long, though without the GIL."""
        assert self._loop is not None
        # Not cancelled when the caller leaves; the engine then drops it.
        self._under_way[call_id] = _nothing
        sending = self._loop.run_in_executor(None, self._send_whole, call_id, peer, answer)
        sending.add_done_callback(partial(self._sent_large, call_id, answer))

    def _send_whole(self, call_id: int, peer: str, answer: Answer) -> None:
        if self._front is not None:
            self._respond(call_id, peer, answer.whole(), answer.trailing)

    def _sent_large(self, call_id: int, answer: Answer, sending: asyncio.Future[None]) -> None:
        self._ended(call_id)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            log.error("a large answer was not sent", exc_info=error)
        _do_afterwards(answer)

    def _ended(self, call_id: int) -> Callable[[], object] | None:
        """What would cancel it; None where it has ended before."""
        cancel = self._under_way.pop(call_id, None)
        if self._draining and not self._under_way:
            self._idle.set()
        return cancel


def _sendable(trailing: Metadata) -> Metadata:
    # The engine keeps names that begin with grpc- to itself; RetryInfo in the details says the same.
    return [pair for pair in trailing if pair[0] != PUSHBACK]


def _do_afterwards(answer: Answer | Failure) -> None:
    if answer.afterwards is not None:
        try:
            answer.afterwards()
        except Exception as error:
            faults.internal(log, "what an answer left to be done failed", error)


def _nothing() -> None:
    """Cancels what has not begun."""
