"""One Redis server. A look-up never raises and never waits longer than the budget.

Look-ups and small fills share a connection, and simultaneous ones share a write. Large fills take long and use a second
connection. A failure opens the server's circuit breaker, and the server is skipped until a probe succeeds.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import AskError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cache.tiers.breaker import Breaker
from cache.tiers.redis_connection import GIVEN_UP, AwaitedCommand, Command, MalformedReplyError, RedisConnection, Reply
from services.runtime.driver import Promise
from services.runtime.telemetry.metrics import Counter, Family, Histogram, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_WRITE_SECONDS = 1.0
_PROBE_SECONDS = 1.0
_RECONNECT_SECONDS = 1.0
# A larger fill would delay the look-ups behind it.
_LARGE_FILL = 16 << 10
# This error affects one key only: another client has stored a value of a different type there.
_WRONG_TYPE: Final = "WRONGTYPE"
_PING: Final = b"*1\r\n$4\r\nPING\r\n"
_ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
ERRORS = Family(
    "ringmesh_redis_errors_total",
    "counter",
    "round trips to Redis and replies that failed; type: slow, lost, refused (full, read-only, not allowed), "
    "damaged (also forged, or written under another secret)",
    ("type",),
)
DURATION = Family("ringmesh_redis_duration_seconds", "histogram", "look-ups and writes in Redis", ("operation",))
FAILURES: Final = (RedisError, OSError, TimeoutError)


def kind_of(error: Exception) -> str:
    if isinstance(error, (TimeoutError, RedisTimeoutError)):
        return "slow"
    if isinstance(error, MalformedReplyError):
        return "damaged"
    return "lost" if isinstance(error, (OSError, RedisConnectionError)) else "refused"


class RedisMetrics:
    """Durations of look-ups and fills, and the failures of all servers by kind."""

    def __init__(self) -> None:
        self.get_times = Histogram()
        self.set_times = Histogram()
        self.errors = Counter(ERRORS)

    def samples(self) -> Iterator[Sample]:
        yield from self.errors.samples()
        yield Sample(DURATION, ("get",), self.get_times.buckets())
        yield Sample(DURATION, ("set",), self.set_times.buckets())


class Fill:
    """A frame to write under `name`. `moved`: another server of the cluster redirected it to this one."""

    def __init__(self, name: bytes, frame: bytes, ttl_ms: int, *, moved: bool = False) -> None:
        self.name = name
        self.frame = frame
        self.ttl_ms = ttl_ms
        self.moved = moved


class _LookUp(AwaitedCommand):
    def __init__(self, node: RedisNode) -> None:
        super().__init__(0)
        self._node = node

    def end(self, reply: Reply) -> None:
        self.reply.settle(self._node.answered(self, reply))


class _Write(Command):
    def __init__(self, node: RedisNode, fill: Fill) -> None:
        super().__init__(len(fill.frame))
        self._node = node
        self._fill = fill

    def end(self, reply: Reply) -> None:
        self._node.written(self, self._fill, reply)


class RedisNode:
    """The server behind `client`. `budget_seconds` is the maximum wait for a look-up.

    `on_failure` is called when the breaker opens, `on_fill` when a fill ends.
    """

    def __init__(
        self,
        name: str,
        client: Redis,
        *,
        budget_seconds: float,
        breaker: Breaker,
        on_failure: Callable[[], None],
        on_fill: Callable[[Fill, Exception | None], None],
        metrics: RedisMetrics,
    ) -> None:
        self.name = name
        self.client = client
        self.breaker = breaker
        self._budget = budget_seconds
        self._on_failure = on_failure
        self._on_fill = on_fill
        self._metrics = metrics
        self._quick: RedisConnection | None = None
        self._bulk: RedisConnection | None = None
        # Open connections, with the task that runs each.
        self._held: dict[RedisConnection, asyncio.Task[None]] = {}
        self._probe_task: asyncio.Task[None] | None = None
        self._reconnected = 0.0

    def may_try(self) -> bool:
        """Whether the server is in use. If a probe is due, starts it in the background."""
        if not self.breaker.is_open:
            return True
        if self._probe_task is None and self.breaker.allow():
            self._probe_task = asyncio.create_task(self._probe())
        return False

    def get(self, name: bytes, *, asking: bool = False) -> Promise[Reply]:
        """Returns an awaitable for the frame under `name`. `asking`: the cluster is moving the slot to this server."""
        look_up = _LookUp(self)
        if not self.may_try():
            look_up.reply.settle(GIVEN_UP)
            return look_up.reply
        connection = self._for_look_ups()
        if asking:
            connection.send(Command(0), (_ASKING,))
        connection.send(look_up, (b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name),))
        return look_up.reply

    def put(self, fill: Fill) -> None:
        """Writes in the background (write-behind). Drops the fill if the server is down or cannot keep up."""
        if self.breaker.is_open:
            self._on_fill(fill, GIVEN_UP)
            return
        size = len(fill.frame)
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(fill.name), fill.name, size)
        ttl = b"%d" % fill.ttl_ms
        parts = (head, fill.frame, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl))
        if size <= _LARGE_FILL:
            self._for_look_ups().send(_Write(self, fill), parts, lazy=True)
        else:
            if self._bulk is None or self._bulk.is_over:
                self._bulk = self._connect(_WRITE_SECONDS)
            self._bulk.send(_Write(self, fill), parts)

    async def close(self) -> None:
        if self._probe_task is not None:
            self._probe_task.cancel()
        await asyncio.gather(*(_finish(connection) for connection in self._held))
        tasks = set(self._held.values())
        for connection in list(self._held):
            connection.close()
        for task in tasks:
            task.cancel()
        if tasks:
            # redis-py can swallow a cancellation.
            await asyncio.wait(tasks, timeout=_WRITE_SECONDS)
        await self.client.aclose()

    def answered(self, look_up: Command, reply: Reply) -> Reply:
        """Called by a look-up. Returns the result to report to its caller."""
        self._metrics.get_times.observe(time.monotonic_ns() - look_up.sent_ns)
        if isinstance(reply, RedisError) and not isinstance(reply, AskError) and not str(reply).startswith(_WRONG_TYPE):
            # The server refuses all look-ups: it is loading its data, or this user has no read permission.
            self._failed(reply)
            return GIVEN_UP
        return reply

    def written(self, write: Command, fill: Fill, reply: Reply) -> None:
        self._metrics.set_times.observe(time.monotonic_ns() - write.sent_ns)
        if isinstance(reply, ReadOnlyError):
            self._reconnect()
        self._on_fill(fill, reply if isinstance(reply, Exception) else None)

    def _for_look_ups(self) -> RedisConnection:
        if self._quick is None or self._quick.is_over:
            self._quick = self._connect(self._budget)
        return self._quick

    def _connect(self, limit_seconds: float) -> RedisConnection:
        connection = RedisConnection(limit_seconds, self._lost)
        task = self._held[connection] = asyncio.create_task(connection.run(self.client))
        task.add_done_callback(lambda _: self._held.pop(connection))
        return connection

    def _reconnect(self) -> None:
        """Reconnects to the new primary after a failover behind one address.

        Limited to once a second, because the server can stay read-only.
        """
        now = time.monotonic()
        if now >= self._reconnected + _RECONNECT_SECONDS:
            self._reconnected = now
            self._disconnect()
            leave = partial(self.client.connection_pool.disconnect, inuse_connections=False)
            BACKGROUND.once("disconnection of a Redis server", leave)

    async def _probe(self) -> None:
        """Probes the server in the background, so that no request waits for a server that is still down."""
        connection = self._connect(self._budget)
        try:
            async with asyncio.timeout(_PROBE_SECONDS):  # more time than for a look-up
                await connection.opened
            ping = AwaitedCommand(0)
            connection.send(ping, (_PING,))
            reply = await ping.reply
            if isinstance(reply, Exception):
                raise reply
        except Exception:
            connection.close()
            self.breaker.failure()
        else:
            self._quick = connection
            self.breaker.success()
            log.info("Redis %s is used again", self.name)
        finally:
            self._probe_task = None

    def _lost(self, connection: RedisConnection, error: Exception) -> None:
        """Called by a connection. The loss of an idle or a probe connection is not a server failure."""
        if not connection.is_idle and (connection is self._quick or connection is self._bulk):
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Opens the breaker and gives up all commands in flight, including those of the other connection."""
        self._metrics.errors.add(kind_of(error))
        if not self.breaker.is_open:
            log.warning("Redis %s is skipped for now: %r", self.name, error)
            self.breaker.failure()
            self._on_failure()
        self._disconnect()

    def _disconnect(self) -> None:
        """Closes both connections and gives up all commands in flight."""
        for connection in (self._quick, self._bulk):
            if connection is not None:
                connection.close()


async def _finish(connection: RedisConnection) -> None:
    """Waits for commands in flight, for a second at most."""
    if not connection.is_idle:
        last = AwaitedCommand(0)
        connection.send(last, (_PING,))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WRITE_SECONDS):
                await last.reply
