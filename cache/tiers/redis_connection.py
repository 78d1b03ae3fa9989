"""A pipelined connection to Redis: all commands of one event loop iteration are sent in one write.

redis-py opens the connection and does the handshake (TLS, users, databases, Sentinels). Its own commands take three
times as long as those here.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from hiredis import PushNotification, Reader
from redis.asyncio import Redis
from redis.exceptions import AskError, MovedError, ReadOnlyError, RedisError, ResponseError

from services.runtime import faults
from services.runtime.driver import Promise
from services.runtime.redis import redis_client

log = logging.getLogger(__name__)

# The result of a command: the stored value, None if there is no value, or the error.
Reply: TypeAlias = bytes | Exception | None

_MAX_COMMANDS = 10_000
_MAX_BYTES = 64 << 20
# Above this size, parts are not joined into one buffer.
_MOST_JOINED = 64 << 10
# A write-behind command waits this long for a look-up that it can share a write with.
_LAZY_SECONDS = 0.005
# Replies can arrive while this process is busy, so it checks once more after this time before it gives up.
_GRACE_SECONDS = 0.001
_MORE: Final = object()
_REFUSALS: Final[dict[str, Callable[[str], Exception]]] = {
    "MOVED": MovedError,
    "ASK": AskError,
    "READONLY": ReadOnlyError,
}


class MalformedReplyError(RedisError):
    """A malformed or unexpected reply; the message says how."""


class GivenUpError(Exception):
    """A command was given up: the server is down, cannot keep up, or is slower than the limit."""


GIVEN_UP: Final = GivenUpError()


class Command:
    """A command in flight from `RedisConnection.send` until `end`, which is called once. `size` is in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent_ns = 0

    def end(self, reply: Reply) -> None:
        """Completes the command with a reply, or with GIVEN_UP if there will be none."""


class AwaitedCommand(Command):
    """A command whose reply is awaited."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reply: Promise[Reply] = Promise()

    def end(self, reply: Reply) -> None:
        self.reply.settle(reply)


class RedisConnection(asyncio.Protocol):
    """A connection that `run` opens and keeps open. Commands sent earlier are queued until it is open.

    Each command ends within `limit_seconds`; otherwise the connection ends, and all commands in flight end as given up.
    `lost` is called first, with the connection and the reason, but not after `close`.
    """

    def __init__(self, limit_seconds: float, lost: Callable[[RedisConnection, Exception], None]) -> None:
        self._limit_ns = int(limit_seconds * 1e9)
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = Reader(replyError=_refusal, notEnoughData=_MORE)
        self._under_way: deque[Command] = deque()
        self._bytes = 0
        self._unsent: list[bytes] = []
        self._is_paused = False
        self._will_flush = False
        self._will_flush_later = False
        self._timer: asyncio.TimerHandle | None = None
        self._overdue: Command | None = None
        # Whether the connection has ended and callers must use another one.
        self.is_over = False
        self.opened: Promise[Exception | None] = Promise()
        self._closed = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        return not self._under_way

    async def run(self, client: Redis) -> None:
        """Opens the connection with the options of `client`, and returns when it has ended. Cancellation closes it."""
        try:
            async with redis_client.lent_connection(client, self) as transport:
                self._transport = transport
                self.opened.settle(None)
                self._flush()
                await self._closed.wait()
        except Exception as error:
            self._end(error)
        finally:
            self.close()

    def send(self, command: Command, parts: tuple[bytes, ...], *, lazy: bool = False) -> None:
        """Sends `parts`, the encoded command. Gives it up if the connection has ended or too much is in flight.

        `lazy`: the command can wait a few milliseconds to share a write with another one.
        """
        command.sent_ns = time.monotonic_ns()
        if self.is_over or len(self._under_way) >= _MAX_COMMANDS or self._bytes + command.size > _MAX_BYTES:
            command.end(GIVEN_UP)
            return
        self._bytes += command.size
        self._under_way.append(command)
        self._unsent.extend(parts)
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_ns / 1e9, self._check)
        if self._will_flush:
            return
        if not lazy:
            self._will_flush = True
            self._loop.call_soon(self._flush)
        elif not self._will_flush_later:
            self._will_flush_later = True
            self._loop.call_later(min(_LAZY_SECONDS, self._limit_ns / 4e9), self._flush_later)

    def close(self) -> None:
        """Ends the connection and gives up all commands in flight."""
        self.is_over = True
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        under_way, self._under_way = self._under_way, deque()
        self._unsent = []
        self._bytes = 0
        for command in under_way:
            self._end_command(command, GIVEN_UP)
        self.opened.settle(GIVEN_UP)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _MORE:
                if reply is None or isinstance(reply, (bytes, Exception)):
                    if not self._under_way:
                        raise MalformedReplyError(f"{str(reply)[:80]!r} was an answer to nothing")
                    command = self._under_way.popleft()
                    self._bytes -= command.size
                    self._end_command(command, reply)
                elif not isinstance(reply, PushNotification):
                    raise MalformedReplyError(f"a command was answered with {str(reply)[:80]!r}")
        except Exception as error:
            self._end(error if isinstance(error, MalformedReplyError) else MalformedReplyError(repr(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("the server has closed the connection"))

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    def _flush(self) -> None:
        self._will_flush = False
        if self._is_paused or self._transport is None or not self._unsent:
            return
        parts, self._unsent = self._unsent, []
        if len(parts) > 1 and self._bytes > _MOST_JOINED:
            self._transport.writelines(parts)
        else:
            self._transport.write(b"".join(parts))

    def _flush_later(self) -> None:
        self._will_flush_later = False
        self._flush()

    def _check(self) -> None:
        """Checks the time limit of the oldest command; later commands expire later."""
        self._timer = None
        if not self._under_way:
            self._overdue = None
            return
        oldest = self._under_way[0]
        left = (oldest.sent_ns + self._limit_ns - time.monotonic_ns()) / 1e9
        if left <= 0 and self._overdue is oldest:
            self._end(TimeoutError(f"no answer within {self._limit_ns / 1e6:.0f} ms"))
            return
        self._overdue = oldest if left <= 0 else None
        self._timer = self._loop.call_later(max(left, _GRACE_SECONDS), self._check)

    def _end(self, error: Exception) -> None:
        if not self.is_over:
            # Set before waiting callers continue, so that they do not use this connection again.
            self.is_over = True
            self._lost(self, error)
            self.close()

    def _end_command(self, command: Command, reply: Reply) -> None:
        try:
            command.end(reply)
        except Exception as error:
            faults.internal(log, "a reply of Redis was lost", error)


def _refusal(text: str) -> Exception:
    code, _, rest = text.partition(" ")
    create = _REFUSALS.get(code)
    try:
        return ResponseError(text) if create is None else create(rest)
    except ValueError:
        return MalformedReplyError(text)
