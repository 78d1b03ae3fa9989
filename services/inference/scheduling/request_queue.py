"""The queue of a model: priority levels, each a bounded queue with its own timeout."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import heapq
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.codec.request import Decoded
from services.runtime.errors import DeadlineExceededError, ResourceExhaustedError

MAX_QUEUE = 4096
# uvloop counts in milliseconds, so a timer may fire up to one early. It is then set again, for at least this time.
_LEAST_SECONDS = 0.001
# The heap may hold as many stale entries as current ones, plus this many.
_LEFT_BEHIND = 64


class QueuedRequest:
    """A request in the queue. `deadline` and `times_out`: in time.monotonic. `queued_ns`: in time.monotonic_ns."""

    def __init__(self, decoded: Decoded, deadline: float | None, future: asyncio.Future[Any]) -> None:
        self.decoded = decoded
        self.deadline = deadline
        self.future = future
        self.queued_ns = time.monotonic_ns()
        self.level: _Level | None = None
        # Infinite without a queue timeout, and after the level has delayed the request.
        self.times_out = math.inf
        self.delayed = False
        # Whether it has begun to run.
        self.begun = False
        # Its number in the queue's heap of deadlines and timeouts; 0: it is not there.
        self.watch = 0


class RequestQueue:
    """Hands out the oldest request of the highest priority level that has not timed out. Level 1 is the highest.

    A request of priority 0 goes to the default level. A request that waits longer than its level's timeout fails; if
    the level delays, it moves behind the requests of its level that have not timed out. A request whose deadline passes
    fails. Both happen when the time is reached, whatever runs then; a request that fails frees its place. The policies
    are those of Triton's ModelDynamicBatching. A level without a max_queue_size holds MAX_QUEUE requests.
    """

    def __init__(self, name: str, batching: config_pb2.ModelDynamicBatching) -> None:
        policies = batching.priority_queue_policy
        numbers = range(1, max(1, batching.priority_levels) + 1)
        self._levels = [_Level(name, policies.get(number, batching.default_queue_policy)) for number in numbers]
        self._default = self._levels[max(0, batching.default_priority_level - 1)]
        # A heap of (time, number): entries of the requests in `_watched`, and stale entries of requests that have left.
        self._times: list[tuple[float, int]] = []
        self._watched: dict[int, QueuedRequest] = {}
        self._last = 0
        # One timer for all entries. `_timer_at` is no later than the earliest time; infinite while there is no timer.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __iter__(self) -> Iterator[QueuedRequest]:
        return (waiting for level in self._levels for waiting in level)

    def __bool__(self) -> bool:
        return any(level.queue or level.delayed for level in self._levels)

    def push(self, waiting: QueuedRequest) -> None:
        # As in Triton, a priority beyond the last level also selects the default level.
        priority = waiting.decoded.priority
        level = self._levels[priority - 1] if 0 < priority <= len(self._levels) else self._default
        level.push(waiting)
        self._watch(waiting)

    def pop(self, now: float) -> QueuedRequest | None:
        """Takes the next request; fails requests whose deadline or timeout has passed. `now`: in time.monotonic.

        Its deadline and timeout apply until `began`.
        """
        self._end_times(now)
        for level in self._levels:
            if (waiting := level.pop()) is not None:
                return waiting
        return None

    def put_back(self, popped: Iterable[QueuedRequest]) -> None:
        """Returns requests to their places. `popped` is in the order in which they were taken."""
        for waiting in reversed([*popped]):
            assert waiting.level is not None
            waiting.level.put_back(waiting)

    def began(self, popped: Iterable[QueuedRequest]) -> None:
        """Marks requests as running. Their deadlines and timeouts no longer apply."""
        for waiting in popped:
            waiting.begun = True
            self._unwatch(waiting)

    def cancelled(self, waiting: QueuedRequest) -> None:
        """Removes a request that has no waiting caller any more, which frees its place."""
        if waiting.level is not None:
            waiting.level.remove(waiting)
        self._unwatch(waiting)

    def _watch(self, waiting: QueuedRequest) -> None:
        at = waiting.times_out if waiting.deadline is None else min(waiting.deadline, waiting.times_out)
        if at == math.inf:
            return
        self._last += 1
        waiting.watch = self._last
        self._watched[self._last] = waiting
        heapq.heappush(self._times, (at, self._last))
        if at < self._timer_at:
            self._set_timer(at)

    def _unwatch(self, waiting: QueuedRequest) -> None:
        if not waiting.watch:
            return
        del self._watched[waiting.watch]
        waiting.watch = 0
        if len(self._times) > 2 * len(self._watched) + _LEFT_BEHIND:
            self._times = [entry for entry in self._times if entry[1] in self._watched]
            heapq.heapify(self._times)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        seconds = max(_LEAST_SECONDS, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = math.inf
        self._end_times(time.monotonic())
        while self._times and self._times[0][1] not in self._watched:
            heapq.heappop(self._times)
        if self._times and self._times[0][0] < self._timer_at:
            self._set_timer(self._times[0][0])

    def _end_times(self, now: float) -> None:
        while self._times and self._times[0][0] <= now:
            waiting = self._watched.pop(heapq.heappop(self._times)[1], None)
            if waiting is not None:
                waiting.watch = 0
                self._end_time(waiting, now)

    def _end_time(self, waiting: QueuedRequest, now: float) -> None:
        level = waiting.level
        assert level is not None
        if waiting.begun:  # a thread runs it already
            return
        if waiting.deadline is not None and waiting.deadline <= now:
            error = DeadlineExceededError("the deadline passed while the request was queued")
        elif level.delays:
            waiting.times_out = math.inf
            level.delay(waiting)
            self._watch(waiting)
            return
        else:
            error = level.timeout_error(waiting)
        level.remove(waiting)
        if not waiting.future.done():
            waiting.future.set_exception(error)


class _Level:
    def __init__(self, name: str, policy: config_pb2.ModelQueuePolicy) -> None:
        self._name = name
        self._max_size = policy.max_queue_size or MAX_QUEUE
        self._timeout_us = policy.default_timeout_microseconds
        self._override = policy.allow_timeout_override
        self.delays = policy.timeout_action == config_pb2.ModelQueuePolicy.DELAY
        # Keeps the order, and removes any request in constant time.
        self.queue: OrderedDict[QueuedRequest, None] = OrderedDict()
        # Requests that have timed out. They follow those in `queue`.
        self.delayed: OrderedDict[QueuedRequest, None] = OrderedDict()

    def __iter__(self) -> Iterator[QueuedRequest]:
        yield from self.queue
        yield from self.delayed

    def push(self, waiting: QueuedRequest) -> None:
        if len(self.queue) + len(self.delayed) >= self._max_size:
            raise ResourceExhaustedError(
                f"model {self._name!r} has {self._max_size} requests waiting, as many as it may; retry later"
            )
        if timeout_us := self._timeout_of(waiting):
            waiting.times_out = time.monotonic() + timeout_us / 1e6
        waiting.level = self
        self.queue[waiting] = None

    def pop(self) -> QueuedRequest | None:
        for waitings in (self.queue, self.delayed):
            while waitings:
                waiting, _ = waitings.popitem(last=False)
                if not waiting.future.done():
                    return waiting
        return None

    def put_back(self, waiting: QueuedRequest) -> None:
        waitings = self.delayed if waiting.delayed else self.queue
        waitings[waiting] = None
        waitings.move_to_end(waiting, last=False)

    def remove(self, waiting: QueuedRequest) -> None:
        (self.delayed if waiting.delayed else self.queue).pop(waiting, None)

    def delay(self, waiting: QueuedRequest) -> None:
        """Moves a request behind the others, unless it has been handed out."""
        if waiting in self.queue:
            del self.queue[waiting]
            waiting.delayed = True
            self.delayed[waiting] = None

    def timeout_error(self, waiting: QueuedRequest) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the request waited for model {self._name!r} longer than its queue timeout of "
            f"{self._timeout_of(waiting)} us"
        )

    def _timeout_of(self, waiting: QueuedRequest) -> int:
        """The timeout of a request. If the level allows it, a request may set a shorter one, but not a longer one."""
        own = waiting.decoded.timeout_us if self._override else 0
        return min(own, self._timeout_us) if own and self._timeout_us else own or self._timeout_us
