"""Events of the fleet, delivered to watchers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

from ringmesh.router.v1 import router_pb2

from router.balancing.member import Member
from services.runtime.errors import ResourceExhaustedError

# Maximum number of events queued for a slow watcher: enough for a change of every worker in a fleet of hundreds.
MAX_WAITING = 4096

Event = router_pb2.WatchResponse


class MembershipEvents:
    """Delivers every event to all watchers, and never waits for one."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[Event | None]] = set()

    def publish(self, kind: Event.Kind.ValueType, member: Member, *, model: str = "", reason: str = "") -> None:
        if self._watchers:
            event = make(kind, member, model=model, reason=reason)
            for queue in self._watchers:
                if queue.qsize() <= MAX_WAITING:
                    queue.put_nowait(event)

    async def watch(self, first: Iterable[Event]) -> AsyncGenerator[Event, None]:
        """Yields `first`, then all events from now on, until `close`.

        Raises ResourceExhaustedError for a watcher that falls MAX_WAITING behind.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for event in first:
                yield event
            while (found := await queue.get()) is not None:
                if queue.qsize() >= MAX_WAITING:
                    raise ResourceExhaustedError(
                        f"the watcher fell {MAX_WAITING} events behind; watch again to hear who is in the ring"
                    )
                yield found
        finally:
            self._watchers.discard(queue)

    def close(self) -> None:
        """Ends all watches, so that they do not delay the server's stop."""
        for queue in self._watchers:
            queue.put_nowait(None)


def make(kind: Event.Kind.ValueType, member: Member, *, model: str = "", reason: str = "") -> Event:
    at_ms = time.time_ns() // 1_000_000
    address, worker_id = member.address, member.worker_id
    return Event(at_ms=at_ms, kind=kind, address=address, worker_id=worker_id, model=model, reason=reason)
