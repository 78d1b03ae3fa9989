"""Recent changes in the fleet, as its routers report them."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

_KEPT = 200
_PAUSE_SECONDS = 2.0
_Kind = router_pb2.WatchResponse.Kind
_VERBS = {
    _Kind.KIND_JOINED: "joined",
    _Kind.KIND_LEFT: "left",
    _Kind.KIND_EJECTED: "was ejected",
    _Kind.KIND_RESTORED: "was restored",
    _Kind.KIND_DRAINING: "drains",
}


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """One change. `at_ms` is in milliseconds since the Unix epoch."""

    at_ms: int
    router: str
    worker: str
    what: str
    reason: str


class EventFeed:
    """Keeps the newest events of the routers' Watch streams."""

    def __init__(self) -> None:
        self._events: deque[FleetEvent] = deque(maxlen=_KEPT)

    def newest(self, count: int) -> list[FleetEvent]:
        """Returns up to `count` events, the newest first."""
        return sorted(self._events, key=lambda event: event.at_ms, reverse=True)[:count]

    async def follow(self, router: str, channel: grpc.aio.Channel) -> None:
        """Reads the stream of one router until cancelled, and reopens it when it ends.

        Returns if the router does not implement Watch.
        """
        stub = router_pb2_grpc.RouterServiceStub(channel)
        while True:
            try:
                async for change in stub.Watch(router_pb2.WatchRequest()):
                    self._add(router, change)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return
            await asyncio.sleep(_PAUSE_SECONDS)

    def _add(self, router: str, change: router_pb2.WatchResponse) -> None:
        if change.kind not in _VERBS:
            # A joining worker reports each of its models; the models page shows these.
            return
        worker = change.worker_id or change.address
        event = FleetEvent(change.at_ms, router, worker, _VERBS[change.kind], change.reason)
        # A stream starts with the current state, which is known already after a reconnect.
        if event not in self._events:
            self._events.append(event)
