"""What waits for a model: levels of priority, each a bounded queue with a timeout of its own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.request import Decoded
from services.runtime.errors import DeadlineExceededError, ResourceExhaustedError

MAX_QUEUE = 4096


class Waiting:
    """A request in the queue; `deadline` in time.monotonic, `queued_ns` in time.time_ns."""

    __slots__ = ("begun", "deadline", "decoded", "delayed", "future", "level", "queued_ns")

    def __init__(self, decoded: Decoded, deadline: float | None, future: asyncio.Future[Any]) -> None:
        self.decoded = decoded
        self.deadline = deadline
        self.future = future
        self.queued_ns = time.time_ns()
        self.level: _Level | None = None
        self.delayed = False
        # Its batch has left the queue.
        self.begun = False


class RequestQueue:
    """Hands out the oldest request of the highest priority, level 1, whose time is not up.

    A request of priority 0 goes to the default level. One that has waited longer than its level's timeout fails, or,
    where the level delays, comes after all of its level that have not. Policies are those of Triton's
    ModelDynamicBatching; a level without a max_queue_size holds MAX_QUEUE.
    """

    def __init__(self, name: str, batching: config_pb2.ModelDynamicBatching) -> None:
        policies = batching.priority_queue_policy
        numbers = range(1, max(1, batching.priority_levels) + 1)
        self._levels = [_Level(name, policies.get(number, batching.default_queue_policy)) for number in numbers]
        self._default = self._levels[max(0, batching.default_priority_level - 1)]

    def __iter__(self) -> Iterator[Waiting]:
        """In the order they would be handed out."""
        return (waiting for level in self._levels for waiting in level)

    def __bool__(self) -> bool:
        return any(level.queue or level.delayed for level in self._levels)

    def push(self, waiting: Waiting) -> None:
        """Raises ResourceExhaustedError where the level is full."""
        # A priority beyond the last level is the default one too, as it is in Triton.
        priority = waiting.decoded.priority
        level = self._levels[priority - 1] if 0 < priority <= len(self._levels) else self._default
        level.push(waiting)

    def pop(self, now: float) -> Waiting | None:
        """The next one; fails those whose deadline or timeout has passed. `now` in time.monotonic."""
        for level in self._levels:
            if waiting := level.pop(now):
                return waiting
        return None

    def put_back(self, popped: Iterable[Waiting]) -> None:
        """Where they were, given in the order they came."""
        for waiting in reversed([*popped]):
            assert waiting.level is not None
            waiting.level.put_back(waiting)

    def cancelled(self, waiting: Waiting) -> None:
        """To be told of each that nobody waits for any more, so that they take nobody's place."""
        if waiting.level is not None:
            waiting.level.cancelled += 1


class _Level:
    def __init__(self, name: str, policy: config_pb2.ModelQueuePolicy) -> None:
        self._name = name
        self._max_size = policy.max_queue_size or MAX_QUEUE
        self._timeout_us = policy.default_timeout_microseconds
        self._override = policy.allow_timeout_override
        self._delays = policy.timeout_action == config_pb2.ModelQueuePolicy.DELAY
        self.queue: deque[Waiting] = deque()
        # Their time was up; newer ones go first.
        self.delayed: deque[Waiting] = deque()
        # Since the queues were last cleared of them.
        self.cancelled = 0

    def __iter__(self) -> Iterator[Waiting]:
        yield from self.queue
        yield from self.delayed

    def push(self, waiting: Waiting) -> None:
        if self._is_full() and self.cancelled:
            self.queue = deque(kept for kept in self.queue if not kept.future.done())
            self.delayed = deque(kept for kept in self.delayed if not kept.future.done())
            self.cancelled = 0
        if self._is_full():
            raise ResourceExhaustedError(
                f"model {self._name!r} has {self._max_size} requests waiting, as many as it may; retry later"
            )
        waiting.level = self
        self.queue.append(waiting)

    def pop(self, now: float) -> Waiting | None:
        now_ns = time.time_ns()
        while self.queue:
            waiting = self.queue.popleft()
            if self._is_gone(waiting, now):
                continue
            timeout_us = self._timeout_of(waiting)
            if not timeout_us or now_ns - waiting.queued_ns <= timeout_us * 1000:
                return waiting
            if self._delays:
                waiting.delayed = True
                self.delayed.append(waiting)
            else:
                waiting.future.set_exception(
                    DeadlineExceededError(
                        f"the request waited for model {self._name!r} longer than its queue timeout of {timeout_us} us"
                    )
                )
        while self.delayed:
            waiting = self.delayed.popleft()
            if not self._is_gone(waiting, now):
                return waiting
        return None

    def put_back(self, waiting: Waiting) -> None:
        (self.delayed if waiting.delayed else self.queue).appendleft(waiting)

    def _is_full(self) -> bool:
        return len(self.queue) + len(self.delayed) >= self._max_size

    def _timeout_of(self, waiting: Waiting) -> int:
        """A request may wait less than its level lets it, where the level allows that, but not more."""
        own = waiting.decoded.timeout_us if self._override else 0
        return min(own, self._timeout_us) if own and self._timeout_us else own or self._timeout_us

    def _is_gone(self, waiting: Waiting, now: float) -> bool:
        if waiting.future.done():
            return True
        if waiting.deadline is not None and waiting.deadline <= now:
            waiting.future.set_exception(DeadlineExceededError("the deadline passed while the request was queued"))
            return True
        return False
