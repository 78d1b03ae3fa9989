"""A lane for calls that can be answered at once, on the native engine.

pygrpc-native's asyncio server makes a task and a context for every call, about as much work as a cache hit itself.
Here a batch of calls is first offered to a plain function on the event loop; what that answers is sent there and
then, and the rest takes the usual way. Measured in docs/performance.md.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import grpc
import pygrpc_native.aio as native  # in 0.5.0, `from pygrpc_native import aio` recurses without end
from pygrpc_native import EVENT_CALL

from services.runtime.rpc import PUSHBACK, Answer, Failure, Lane, Metadata

_FLUSH_SECONDS = 0.1


class FastLaneServer(native.Server):
    """`pygrpc_native.aio.server()` with lanes by method path, on three of its private names that our tests hold."""

    def __init__(self, options: list[tuple[str, Any]], lanes: Mapping[str, Lane]) -> None:
        super().__init__(options=options)
        self._lanes = lanes
        self._largest = self._receive_limit if self._receive_limit is not None else sys.maxsize
        self._lane_of: list[Lane | None] = []
        self._draining = False

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

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        front = self._front
        if front is None or self._stopping or not self._lane_of:
            super()._on_events(events)
            return
        rest = []
        for event in events:
            kind, call_id, method_id, payload, client, details = event
            if self._draining and kind == EVENT_CALL:
                front.fail(call_id, grpc.StatusCode.UNAVAILABLE.value[0], "the server is draining")
                continue
            lane = self._lane_of[method_id] if kind == EVENT_CALL else None
            if lane is not None and len(payload) <= self._largest:
                answer = lane(payload, details[0])
                if type(answer) is Answer:
                    front.respond(call_id, answer.body, trailing_metadata=answer.trailing)
                    continue
                if type(answer) is Failure:
                    trailing = _sendable(answer.trailing)
                    front.fail(call_id, answer.code.value[0], answer.message, trailing_metadata=trailing)
                    continue
                event = (kind, call_id, method_id, answer, client, details)
            rest.append(event)
        if rest:
            super()._on_events(rest)


def _sendable(trailing: Metadata) -> Metadata:
    # The engine keeps names that begin with grpc- to itself; RetryInfo in the details says the same.
    return [pair for pair in trailing if pair[0] != PUSHBACK]
