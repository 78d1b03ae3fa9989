"""A lane for calls that can be answered at once, on the native engine.

pygrpc-native's asyncio server makes a task and a context for every call, about as much work as a cache hit itself.
Here a batch of calls is first offered to a plain function, on the thread that takes them from the engine; what that
answers is sent there and then, and the rest goes to the event loop in one wake-up. Measured in docs/performance.md.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import pygrpc_native.aio as native  # in 0.5.0, `from pygrpc_native import aio` recurses without end
from pygrpc_native import EVENT_CALL, NativeGrpcFront

from services.runtime.rpc import PUSHBACK, Answer, Failure, Lane, Metadata, unexpected

log = logging.getLogger(__name__)

_BATCH = 64
_FLUSH_SECONDS = 0.1


class FastLaneServer(native.Server):
    """`pygrpc_native.aio.server()` with lanes by method path, on four of its private names that our tests hold."""

    def __init__(self, options: list[tuple[str, Any]], lanes: Mapping[str, Lane]) -> None:
        super().__init__(options=options)
        self._lanes = lanes
        self._largest = self._receive_limit if self._receive_limit is not None else sys.maxsize
        self._lane_of: list[Lane | None] = []
        self._draining = False
        # CPU time of the lanes' thread.
        self.lane_seconds = 0.0

    async def start(self) -> None:
        """Serves."""
        await super().start()
        self._lane_of = [self._lanes.get(path) for path, _ in self._table]

    async def stop(self, grace: float | None) -> None:
        """Turns new calls away, waits for those under way, and closes only when their answers have left."""
        self._draining = True
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if self._fallback is not None:
            tasks.append(asyncio.create_task(self._fallback.stop(grace)))
        if tasks:
            await asyncio.wait(tasks, timeout=grace or 0)
        # Closing takes with it what the engine has not yet written to its sockets; it has no way to wait for that.
        await asyncio.sleep(_FLUSH_SECONDS)
        await super().stop(0)

    def _fail(self, call: Any, context: Any, details: str | None) -> None:
        context._trailing_metadata = _sendable(context._trailing_metadata)
        super()._fail(call, context, details)

    def _dispatch(self) -> None:
        """On the engine's receiving thread: a hit answered here spares it and the event loop a wake-up each."""
        front, loop = self._front, self._loop
        assert front is not None
        assert loop is not None
        while (events := front.recv_batch_details(_BATCH)) is not None:
            rest, afterwards = self._answer_at_once(front, events)
            self.lane_seconds = time.thread_time()
            try:
                if rest:
                    loop.call_soon_threadsafe(self._on_events, rest)
                for call in afterwards:
                    loop.call_soon_threadsafe(call)
            except RuntimeError:
                # The loop was closed without stop().
                front.close()
                return

    def _answer_at_once(
        self, front: NativeGrpcFront, events: list[tuple[Any, ...]]
    ) -> tuple[list[tuple[Any, ...]], list[Callable[[], None]]]:
        """What is left of the events, and what the answers leave to be done."""
        rest, afterwards = [], []
        lanes, largest = self._lane_of, self._largest
        for event in events:
            kind, call_id, method_id, payload, client, details = event
            lane = lanes[method_id] if kind == EVENT_CALL and lanes else None
            if lane is not None and not self._draining and len(payload) <= largest:
                try:
                    answer = lane(payload, details[0])
                except Exception as error:
                    log.exception("a lane failed")
                    front.fail(call_id, grpc.StatusCode.INTERNAL.value[0], unexpected(error).message)
                    continue
                if type(answer) is Answer:
                    front.respond(call_id, answer.body, trailing_metadata=answer.trailing)
                elif type(answer) is Failure:
                    trailing = _sendable(answer.trailing)
                    front.fail(call_id, answer.code.value[0], answer.message, trailing_metadata=trailing)
                if type(answer) is Answer or type(answer) is Failure:
                    if answer.afterwards is not None:
                        afterwards.append(answer.afterwards)
                    continue
                event = (kind, call_id, method_id, answer, client, details)
            rest.append(event)
        return rest, afterwards

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        if self._draining and self._front is not None:
            for event in events:
                if event[0] == EVENT_CALL:
                    self._front.fail(event[1], grpc.StatusCode.UNAVAILABLE.value[0], "the server is draining")
            events = [event for event in events if event[0] != EVENT_CALL]
        super()._on_events(events)


def _sendable(trailing: Metadata) -> Metadata:
    # The engine keeps names that begin with grpc- to itself; RetryInfo in the details says the same.
    return [pair for pair in trailing if pair[0] != PUSHBACK]
