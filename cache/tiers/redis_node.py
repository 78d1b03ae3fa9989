"""One Redis server: never an error, never a wait beyond the budget.

Look-ups that arrive while a round trip is under way leave together; fills are written behind the answer, in
pipelines. A failure opens the server's circuit breaker, and it is skipped until a probe succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cache.tiers.breaker import Breaker
from services.runtime.telemetry.metrics import Counter, Histogram

log = logging.getLogger(__name__)

_MAX_UNWRITTEN_BYTES = 64 << 20
_MAX_PIPELINE = 256
_WRITE_SECONDS = 1.0
_PROBE_SECONDS = 1.0
FAILURES: Final = (RedisError, OSError, TimeoutError)

# What a look-up can end with: a frame, None where there is none, or the error that stands for it.
Reply = bytes | None | Exception


class NonsenseError(RedisError):
    """A reply that is none; the message says how."""


class GivenUpError(Exception):
    """The server is down, or slower than the budget."""


_GIVEN_UP = GivenUpError()


def kind_of(error: Exception) -> str:
    """What went wrong with a server, in a word."""
    if isinstance(error, (TimeoutError, RedisTimeoutError)):
        return "slow"
    if isinstance(error, NonsenseError):
        return "damaged"
    return "lost" if isinstance(error, (OSError, RedisConnectionError)) else "refused"


class Fill(NamedTuple):
    """A frame to be written under `name`. `moved`: another server of the cluster sent it here."""

    name: bytes
    frame: bytes
    ttl_ms: int
    moved: bool = False


class _Batch:
    """Look-ups that leave together; the first of them starts the budget."""

    __slots__ = ("asking", "ends", "timer", "waiters")

    def __init__(self, ends: float, timer: asyncio.TimerHandle) -> None:
        self.waiters: dict[bytes, asyncio.Future[Reply]] = {}
        self.asking: set[bytes] = set()
        self.ends = ends
        self.timer = timer

    def end(self) -> None:
        """Gives up for all that still wait."""
        self.timer.cancel()
        for waiter in self.waiters.values():
            if not waiter.done():
                waiter.set_result(_GIVEN_UP)


class RedisNode:
    """The server behind `client`. `budget_seconds` bounds what a look-up may wait.

    `one_slot`: whether its keys may share an MGET, which in a cluster they may not. `on_failure` hears when the
    breaker opens, `on_fill` how each fill ended. `get_times` and `set_times` take the nanoseconds of each round trip,
    `errors` the kind of each that failed.
    """

    def __init__(
        self,
        name: str,
        client: Redis,
        *,
        budget_seconds: float,
        breaker: Breaker,
        one_slot: bool,
        on_failure: Callable[[], None],
        on_fill: Callable[[Fill, Exception | None], None],
        get_times: Histogram,
        set_times: Histogram,
        errors: Counter,
    ) -> None:
        self.name = name
        self.client = client
        self.breaker = breaker
        self._budget = budget_seconds
        self._one_slot = one_slot
        self._on_failure = on_failure
        self._on_fill = on_fill
        self._get_times = get_times
        self._set_times = set_times
        self._errors = errors
        self._pending: _Batch | None = None
        self._unwritten: dict[bytes, Fill] = {}
        self._unwritten_bytes = 0
        self._lookup_task: asyncio.Task[None] | None = None
        self._write_task: asyncio.Task[None] | None = None
        self._probe_task: asyncio.Task[None] | None = None

    def may_try(self) -> bool:
        """Whether it is used now; where a probe is due, that leaves, and nobody waits for it."""
        if not self.breaker.is_open:
            return True
        if self.breaker.allow():
            self._probe_task = asyncio.create_task(self._probe())
        return False

    async def get(self, name: bytes, *, asking: bool = False) -> Reply:
        """The frame under `name`. A cancelled look-up goes on. `asking`: a cluster is moving the slot to it."""
        if not self.may_try():
            return _GIVEN_UP
        loop = asyncio.get_running_loop()
        if (batch := self._pending) is None:
            ends = loop.time() + self._budget
            self._pending = batch = _Batch(ends, loop.call_at(ends, self._expire))
        waiter = batch.waiters.get(name)
        if waiter is None:
            waiter = batch.waiters[name] = loop.create_future()
        if asking:
            batch.asking.add(name)
        if self._lookup_task is None:
            self._lookup_task = asyncio.create_task(self._look_up())
        # Shielded: another caller may wait for the same key.
        return await asyncio.shield(waiter)

    def put(self, fill: Fill) -> None:
        """Writes behind; the newest frame of a name counts. Dropped where the server is down or cannot keep up."""
        size = len(fill.frame)
        if self.breaker.is_open or self._unwritten_bytes + size > _MAX_UNWRITTEN_BYTES:
            self._on_fill(fill, _GIVEN_UP)
            return
        if (old := self._unwritten.pop(fill.name, None)) is not None:
            self._unwritten_bytes -= len(old.frame)
        self._unwritten_bytes += size
        self._unwritten[fill.name] = fill
        if self._write_task is None:
            self._write_task = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Writes what is left, for a second at most, and disconnects."""
        if self._write_task is not None:
            await asyncio.wait([self._write_task], timeout=_WRITE_SECONDS)
        for task in (self._lookup_task, self._write_task, self._probe_task):
            if task is not None:
                task.cancel()
        if self._pending is not None:
            self._pending.end()
        await self.client.aclose()

    async def _look_up(self) -> None:
        try:
            while (batch := self._pending) is not None:
                self._pending = None
                batch.timer.cancel()
                names = list(batch.waiters)
                start = time.monotonic_ns()
                try:
                    async with asyncio.timeout_at(batch.ends):
                        replies = await self._fetch(names, batch.asking)
                    for name, reply in zip(names, _checked(replies, len(names)), strict=True):
                        waiter = batch.waiters[name]
                        if not waiter.done():
                            waiter.set_result(reply)
                except Exception as error:
                    self._failed(error)
                finally:
                    # Whatever it was: callers wait.
                    batch.end()
                self._get_times.observe(time.monotonic_ns() - start)
        finally:
            self._lookup_task = None

    async def _fetch(self, names: list[bytes], asking: set[bytes]) -> list[Any]:
        if self._one_slot:
            found: list[Any] = await self.client.mget(names)
            return found
        pipeline = self.client.pipeline(transaction=False)
        gets = []
        for name in names:
            if name in asking:
                pipeline.execute_command("ASKING")
            gets.append(len(pipeline))
            pipeline.get(name)
        replies = await pipeline.execute(raise_on_error=False)
        return [replies[index] for index in gets]

    async def _write(self) -> None:
        try:
            while self._unwritten:
                pipeline = self.client.pipeline(transaction=False)
                fills = [self._unwritten.pop(name) for name in list(self._unwritten)[:_MAX_PIPELINE]]
                for fill in fills:
                    self._unwritten_bytes -= len(fill.frame)
                    pipeline.set(fill.name, fill.frame, px=fill.ttl_ms)
                replies: list[Any]
                start = time.monotonic_ns()
                try:
                    async with asyncio.timeout(_WRITE_SECONDS):
                        replies = await pipeline.execute(raise_on_error=False)
                except Exception as error:
                    self._failed(error)
                    replies = [_GIVEN_UP] * len(fills)
                self._set_times.observe(time.monotonic_ns() - start)
                if any(isinstance(reply, ReadOnlyError) for reply in replies):
                    # A failover behind one address: connect anew, to what is the primary now.
                    await self.client.connection_pool.disconnect(inuse_connections=False)
                for fill, reply in zip(fills, replies, strict=True):
                    self._on_fill(fill, reply if isinstance(reply, Exception) else None)
        finally:
            self._write_task = None

    async def _probe(self) -> None:
        """Off the path of any request, so that nobody waits to learn that the server is still down."""
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                await self.client.ping()  # connects, which may take longer than a look-up may
            async with asyncio.timeout(self._budget):
                await self.client.ping()
        except Exception:
            self.breaker.failure()
        else:
            self.breaker.success()
            log.info("Redis %s is used again", self.name)

    def _expire(self) -> None:
        """The budget ends while the batch still waits for the trip before it."""
        self._failed(TimeoutError(f"no answer within {self._budget * 1000:.0f} ms"))

    def _failed(self, error: Exception) -> None:
        """Nobody waits on, nor those that gathered behind the trip that failed."""
        self._errors.add(kind_of(error))
        if not self.breaker.is_open:
            log.warning("Redis %s is skipped for now: %r", self.name, error)
            self.breaker.failure()
            self._on_failure()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.end()
        unwritten, self._unwritten = self._unwritten, {}
        self._unwritten_bytes = 0
        for fill in unwritten.values():
            self._on_fill(fill, _GIVEN_UP)


def _checked(replies: Any, count: int) -> list[Reply]:
    """Raises NonsenseError unless they are replies to `count` look-ups."""
    if not isinstance(replies, list) or len(replies) != count:
        raise NonsenseError(f"{count} look-ups were answered with {str(replies)[:80]!r}")
    for reply in replies:
        if reply is not None and not isinstance(reply, (bytes, Exception)):
            raise NonsenseError(f"a look-up was answered with {str(reply)[:80]!r}")
    checked: list[Reply] = replies
    return checked
