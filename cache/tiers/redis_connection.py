"""A connection to Redis for the commands of requests: those of one iteration of the event loop leave in one write.

redis-py opens it and speaks first (TLS, users, databases, Sentinels); for a command it needs three times as much time.
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
from services.runtime.completion import Completion
from services.runtime.redis import redis_client

log = logging.getLogger(__name__)

# What a command can end with: what is there, None where there is nothing, or the error that stands for it.
Reply: TypeAlias = bytes | Exception | None

_MAX_COMMANDS = 10_000
_MAX_BYTES = 64 << 20
# Above, parts are not copied to be sent as one.
_MOST_JOINED = 64 << 10
# What is written behind waits so long for a look-up that it can leave with.
_LAZY_SECONDS = 0.005
# The replies may have come while this process was busy: it looks for them once more before it gives up.
_GRACE_SECONDS = 0.001
_MORE: Final = object()
_REFUSALS: Final[dict[str, Callable[[str], Exception]]] = {
    "MOVED": MovedError,
    "ASK": AskError,
    "READONLY": ReadOnlyError,
}


class NonsenseError(RedisError):
    """A reply that is none; the message says how."""


class GivenUpError(Exception):
    """The server is down, cannot keep up, or is slower than the limit."""


GIVEN_UP: Final = GivenUpError()


class Command:
    """Under way from `RedisConnection.send` until `end`, which is called once. `size` is in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent_ns = 0

    def end(self, reply: Reply) -> None:
        """There is a reply, or there will be none."""


class Question(Command):
    """A command whose reply is awaited."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reply: Completion[Reply] = Completion()

    def end(self, reply: Reply) -> None:
        """From the connection."""
        self.reply.complete(reply)


class RedisConnection(asyncio.Protocol):
    """Opened and held by `run`. Commands may be sent before it is open, and leave when it is.

    Each ends within `limit_seconds`, or the connection does, and all commands under way with it as given up. `lost`
    hears of that end and its reason first, but not of `close`.
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
        # Whether to use another one.
        self.is_over = False
        self.opened: Completion[Exception | None] = Completion()
        self._closed = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way

    async def run(self, client: Redis) -> None:
        """Opens it as `client` opens its own, and returns when it is over. Cancelled: closes it."""
        try:
            async with redis_client.lent_connection(client, self) as transport:
                self._transport = transport
                self.opened.complete(None)
                self._flush()
                await self._closed.wait()
        except Exception as error:
            self._end(error)
        finally:
            self.close()

    def send(self, command: Command, parts: tuple[bytes, ...], *, lazy: bool = False) -> None:
        """`parts` are the command, packed. Given up where it is over, or too much is under way.

        `lazy`: it may wait a few milliseconds for another one to leave with.
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
        """Ends it; what is under way is given up."""
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
        self.opened.complete(GIVEN_UP)

    def data_received(self, data: bytes) -> None:
        """From asyncio."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _MORE:
                if reply is None or isinstance(reply, (bytes, Exception)):
                    if not self._under_way:
                        raise NonsenseError(f"{str(reply)[:80]!r} was an answer to nothing")
                    command = self._under_way.popleft()
                    self._bytes -= command.size
                    self._end_command(command, reply)
                elif not isinstance(reply, PushNotification):
                    raise NonsenseError(f"a command was answered with {str(reply)[:80]!r}")
        except Exception as error:
            self._end(error if isinstance(error, NonsenseError) else NonsenseError(repr(error)))

    def connection_lost(self, error: Exception | None) -> None:
        """From asyncio."""
        self._end(error or ConnectionError("the server has closed the connection"))

    def pause_writing(self) -> None:
        """From asyncio."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """From asyncio."""
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
        """Of the time limit of the oldest command; those behind it have theirs later."""
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
            # Before those that wait go on: they shall know that it is not to be used.
            self.is_over = True
            self._lost(self, error)
            self.close()

    def _end_command(self, command: Command, reply: Reply) -> None:
        try:
            command.end(reply)
        except Exception as error:
            faults.internal(log, "a reply of Redis was lost", error)


def _refusal(text: str) -> Exception:
    """The error that Redis answers with."""
    code, _, rest = text.partition(" ")
    create = _REFUSALS.get(code)
    try:
        return ResponseError(text) if create is None else create(rest)
    except ValueError:
        return NonsenseError(text)
