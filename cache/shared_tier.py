"""The tier in Redis, shared by the fleet: never an error, never a wait beyond its budget.

Look-ups that arrive while a round trip is under way leave together as one MGET; fills are written
behind the answer, in pipelines. A failure opens a circuit breaker, and the tier is skipped until a
probe succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cache.breaker import Breaker
from cache.entry import Entry, pack, unpack
from cache.stats import TierCounters
from services.runtime.metrics import Histogram
from services.runtime.server import StartError

log = logging.getLogger(__name__)

_PREFIX = b"rm1:"
_MAX_UNWRITTEN_BYTES = 64 << 20
_MAX_PIPELINE = 256
_WRITE_SECONDS = 1.0
_FAILURES = (RedisError, OSError, TimeoutError)


def connect(url: str) -> Redis:
    """A client that neither retries nor waits long by itself. Raises StartError where the URL is not one."""
    try:
        return Redis.from_url(url, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0), protocol=3)
    except ValueError as error:
        raise StartError(f"RINGMESH_REDIS_URL: {url!r} is not a Redis URL: {error}") from None


class _Batch:
    """Look-ups that leave together; the first of them starts the budget."""

    __slots__ = ("timer", "waiters")

    def __init__(self) -> None:
        self.waiters: dict[bytes, asyncio.Future[Entry | None]] = {}
        self.timer: asyncio.TimerHandle | None = None

    def end(self) -> int:
        """Misses for all that still wait; how many there were."""
        if self.timer is not None:
            self.timer.cancel()
        left = [waiter for waiter in self.waiters.values() if not waiter.done()]
        for waiter in left:
            waiter.set_result(None)
        return len(left)


class SharedTier:
    """Entries in Redis under `rm1:<key>`, kept for `ttl_seconds` (give or take a tenth, so as not to end together).

    `budget_seconds` bounds what a look-up may wait; past it, it is a miss.
    """

    def __init__(self, redis: Redis, *, ttl_seconds: float, budget_seconds: float, breaker: Breaker) -> None:
        self._redis = redis
        self._ttl_ms = ttl_seconds * 1000
        self._budget = budget_seconds
        self._breaker = breaker
        self._pending: _Batch | None = None
        self._unwritten: dict[bytes, bytes] = {}
        self._unwritten_bytes = 0
        self._lookup_task: asyncio.Task[None] | None = None
        self._write_task: asyncio.Task[None] | None = None
        self._probe_task: asyncio.Task[None] | None = None
        self.counters = TierCounters("shared")
        self.get_times = Histogram()
        self.set_times = Histogram()

    @property
    def is_skipped(self) -> bool:
        """Whether Redis failed and is not back."""
        return self._breaker.is_open

    async def get(self, key: bytes) -> Entry | None:
        """None on a miss, and where Redis is down, slow, or holds something damaged. A cancelled look-up goes on."""
        if self._breaker.is_open:
            self.counters.failures += 1
            if self._breaker.allow():
                self._probe_task = asyncio.create_task(self._probe())
            return None
        if self._pending is None:
            self._pending = batch = _Batch()
            batch.timer = asyncio.get_running_loop().call_later(self._budget, self._expire, batch)
        waiter = self._pending.waiters.get(key)
        if waiter is None:
            waiter = self._pending.waiters[key] = asyncio.get_running_loop().create_future()
        if self._lookup_task is None:
            self._lookup_task = asyncio.create_task(self._look_up())
        # Shielded: another caller may wait for the same key.
        return await asyncio.shield(waiter)

    def put(self, key: bytes, entry: Entry) -> None:
        """Writes behind. Dropped (and counted) where Redis is down or cannot keep up."""
        frame = pack(key, entry)
        if self._breaker.is_open or self._unwritten_bytes + len(frame) > _MAX_UNWRITTEN_BYTES:
            self.counters.failures += 1
            return
        if key not in self._unwritten:
            self._unwritten[key] = frame
            self._unwritten_bytes += len(frame)
        if self._write_task is None:
            self._write_task = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Writes what is left, for a second at most, and disconnects."""
        if self._write_task is not None:
            await asyncio.wait([self._write_task], timeout=_WRITE_SECONDS)
        for task in (self._lookup_task, self._write_task, self._probe_task):
            if task is not None:
                task.cancel()
        await self._redis.aclose()

    async def _look_up(self) -> None:
        try:
            while (batch := self._pending) is not None:
                self._pending = None
                keys = list(batch.waiters)
                start = time.monotonic_ns()
                try:
                    async with asyncio.timeout(self._budget):
                        frames: list[Any] = await self._redis.mget([_PREFIX + key for key in keys])
                except _FAILURES as error:
                    self._failed(error, batch)
                else:
                    self._deliver(batch, keys, frames)
                self.get_times.observe(time.monotonic_ns() - start)
        finally:
            self._lookup_task = None

    def _deliver(self, batch: _Batch, keys: list[bytes], frames: list[bytes | None]) -> None:
        for key, frame in zip(keys, frames, strict=True):
            entry = None
            if frame is None:
                self.counters.misses += 1
            elif (entry := unpack(key, frame)) is None:
                self.counters.failures += 1
            else:
                self.counters.hits += 1
                self.counters.saved_compute_us += entry.compute_us
            waiter = batch.waiters[key]
            if not waiter.done():
                waiter.set_result(entry)
        batch.end()

    async def _write(self) -> None:
        try:
            while self._unwritten:
                keys = list(self._unwritten)[:_MAX_PIPELINE]
                pipeline = self._redis.pipeline(transaction=False)
                for key in keys:
                    frame = self._unwritten.pop(key)
                    self._unwritten_bytes -= len(frame)
                    pipeline.set(_PREFIX + key, frame, px=int(self._ttl_ms * random.uniform(0.9, 1.1)))
                start = time.monotonic_ns()
                try:
                    async with asyncio.timeout(_WRITE_SECONDS):
                        await pipeline.execute()
                except _FAILURES as error:
                    self.counters.failures += len(keys)
                    self._failed(error)
                else:
                    self.counters.fills += len(keys)
                self.set_times.observe(time.monotonic_ns() - start)
        finally:
            self._write_task = None

    async def _probe(self) -> None:
        """Off the path of any request, so that nobody waits to learn that Redis is still down."""
        try:
            async with asyncio.timeout(self._budget):
                await self._redis.ping()
        except _FAILURES:
            self._breaker.failure()
        else:
            self._breaker.success()
            log.info("the shared tier is back")

    def _expire(self, batch: _Batch) -> None:
        if batch is self._pending:
            self._pending = None
        self._failed(TimeoutError(f"no answer within {self._budget * 1000:.0f} ms"), batch)

    def _failed(self, error: Exception, batch: _Batch | None = None) -> None:
        """Nobody waits on: not the batch that failed, not those that gathered behind it."""
        if not self._breaker.is_open:
            log.warning("the shared tier is skipped for now: Redis: %r", error)
            self._breaker.failure()
        for ended in (batch, self._pending):
            if ended is not None:
                self.counters.failures += ended.end()
        self._pending = None
        self.counters.failures += len(self._unwritten)
        self._unwritten.clear()
        self._unwritten_bytes = 0
