"""Invalidation: the processes of a region share purges through two hashes in Redis.

Each process sends a heartbeat ten times a second. It reports the version of the epochs that it applies and receives
newer epochs. A purge writes its epoch and returns when every process has confirmed it. Processes poll, because a purge
needs a confirmation from each process anyway and publish/subscribe loses messages.

A process without a connection to Redis can still answer from its local tier. Therefore, a process that is disconnected
for longer than the lease returns only answers that were computed within the lease, and a purge that lacks a
confirmation waits until the lease has expired. Decision record 0012 has the reasoning.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any

from cache.keys.epochs import LARGEST_EPOCH, Epochs
from cache.tiers.shared_tier import SharedTier
from services.runtime.errors import ResourceExhaustedError, UnavailableError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

EPOCHS = b"{rm1-mesh}:epochs"
_MEMBERS = b"{rm1-mesh}:members"
_BEAT_SECONDS = 0.1
_COMMAND_SECONDS = 1.0
# If the last heartbeat of a process is older than this, a purge waits for the lease instead of a confirmation.
_SILENT_MS = 1000
# A process stops serving older answers this long before its lease is over: the wait of a purge begins before the
# command that writes the purge, which takes up to _COMMAND_SECONDS.
_NOTICE_SECONDS = 2.0
# A purge ignores a process without a heartbeat for this long. A process disconnected for this long serves no cached
# answers.
_FORGET_SECONDS = 3600.0
_MAX_SCOPES = 10_000
# Digits of an epoch.
_MOST_DIGITS = 18
# Every running process sends a heartbeat within this time, even if Redis has just lost its list of members.
_SETTLE_SECONDS = 3 * _BEAT_SECONDS

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000) "
# KEYS: epochs, members. ARGV: member, version it applies. Returns the version, and all scopes if the version differs.
_BEAT = (
    _NOW
    + """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', now))
if version == ARGV[2] then return {version} end
local found = redis.call('HGETALL', KEYS[1])
table.insert(found, 1, version)
return found
"""
)
# ARGV: the smallest epoch to assign, the maximum number of scopes, the scopes. Returns the epoch, or "full".
_PURGE = (
    _NOW
    + """
local epoch = math.max(now, (redis.call('HGET', KEYS[1], 'version') or 0) + 1, ARGV[1] + 0)
local text = string.format('%.0f', epoch)
for i = 3, #ARGV do if ARGV[i] == 'all' then redis.call('DEL', KEYS[1]) end end
local added = 0
for i = 3, #ARGV do added = added + 1 - redis.call('HEXISTS', KEYS[1], ARGV[i]) end
if added > 0 and redis.call('HLEN', KEYS[1]) + added > ARGV[2] + 0 then return 'full' end
for i = 3, #ARGV do redis.call('HSET', KEYS[1], ARGV[i], text) end
redis.call('HSET', KEYS[1], 'version', text)
return text
"""
)
# ARGV: alternating scopes and epochs. The larger epoch wins.
_MERGE = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
for i = 1, #ARGV, 2 do
  if ARGV[i + 1] + 0 > (redis.call('HGET', KEYS[1], ARGV[i]) or 0) + 0 then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    if ARGV[i + 1] + 0 > version + 0 then version = ARGV[i + 1] end
  end
end
redis.call('HSET', KEYS[1], 'version', version)
return version
"""
# ARGV: milliseconds after which a member is removed. Returns the current time, then alternating members and reports.
_MEMBERS_NOW = (
    _NOW
    + """
local found = {string.format('%.0f', now)}
local all = redis.call('HGETALL', KEYS[2])
for i = 1, #all, 2 do
  local beat = string.match(all[i + 1], ' (%d+)')
  if now - beat > ARGV[1] + 0 then redis.call('HDEL', KEYS[2], all[i])
  else table.insert(found, all[i]) table.insert(found, all[i + 1]) end
end
return found
"""
)


class InvalidationLog:
    """Keeps `epochs`, this process's snapshot of the purges, in step with all processes on one Redis.

    `shared` is None if the process runs without Redis. `member` names the process and is stable across restarts.
    `is_known` is False until the first reply from Redis.
    """

    def __init__(self, shared: SharedTier | None, member: str, lease_seconds: float) -> None:
        self.epochs = Epochs({})
        self.is_known = shared is None
        self.changed = asyncio.Event()
        # Called with the scopes that were purged or announced since its last call, before this process confirms them.
        # Returns False to be called with them again at the next heartbeat.
        self.on_news: Callable[[set[str]], Awaitable[bool]] = _nothing
        # What Redis had at that call. `epochs` also has this process's own purges, which must not hide older ones of
        # others.
        self._told: Mapping[str, int] = {}
        self._shared = shared
        self._member = member
        self._lease = lease_seconds
        # The version last read from Redis. This process's own purges can be newer than purges that it has not read yet.
        # Heartbeats run one at a time, so that none confirms a version that another is still applying.
        self._version_read = 0
        self._heartbeat_lock = asyncio.Lock()
        # When the last completed heartbeat began. Never over without Redis: nobody else purges.
        self._contact = inf if shared is None else time.monotonic()
        self._said_limited = False
        self._task: asyncio.Task[None] | None = None

    @property
    def oldest_ms(self) -> int:
        """Entries computed before this time are not served; 0 while heartbeats are completed.

        Computed at each look-up: it must hold while the event loop is held up, and right after the process was stopped.
        """
        waited = time.monotonic() - self._contact
        if waited <= self._lease - _NOTICE_SECONDS:
            return 0
        if waited > _FORGET_SECONDS - _NOTICE_SECONDS:
            return sys.maxsize
        return time.time_ns() // 1_000_000 - int((self._lease - _NOTICE_SECONDS) * 1000)

    def start(self) -> None:
        if self._shared is not None:
            self._contact = time.monotonic()
            self._task = BACKGROUND.start("purges", self._send_heartbeats)

    async def announce(self, scope: str) -> None:
        """Purges a scope that contains no keys. Returns when `on_news` has run in every process.

        Without Redis, other processes do not hear of it. Raises as `purge`.
        """
        if self._shared is not None:
            await self._publish([scope])

    async def purge(self, scopes: Sequence[str]) -> tuple[int, int]:
        """Returns the epoch and the number of processes that confirmed it, when no process serves older entries.

        Raises UnavailableError if Redis is unreachable (the purge can have been written, and is safe to repeat), and
        ResourceExhaustedError if too many single scopes were purged since the last purge of everything.
        """
        if self._shared is None:
            epoch = max(time.time_ns() // 1_000_000, self.epochs.version + 1)
            self._merge(dict.fromkeys(scopes, epoch))
            return epoch, 1
        return await self._publish(scopes)

    async def merge(self, scopes: Mapping[str, int]) -> None:
        """Applies the purges of another region. Raises UnavailableError."""
        if any(epoch > self.epochs.scopes.get(scope, 0) for scope, epoch in scopes.items()):
            if self._shared is not None:
                await self._run(_MERGE, *_flat(scopes))
            self._merge(scopes)

    async def close(self) -> None:
        """Leaves the list of members, so that no purge waits for this process."""
        if self._task is None:
            return
        self._task.cancel()
        assert self._shared is not None
        try:
            await self._shared.run(EPOCHS, _COMMAND_SECONDS, "HDEL", _MEMBERS, self._member)
        except UnavailableError as error:
            log.debug("this process could not be removed from the list of members: %s", error.message)

    async def _publish(self, scopes: Sequence[str]) -> tuple[int, int]:
        start = time.monotonic()
        reply = await self._run(_PURGE, str(self.epochs.version + 1), str(_MAX_SCOPES), *scopes)
        if reply == b"full":
            raise ResourceExhaustedError(
                f"{_MAX_SCOPES} models, tenants and keys were purged since everything was; purge everything"
            )
        epoch = int(reply)
        if epoch > LARGEST_EPOCH:
            raise UnavailableError(f"Redis has an epoch above {LARGEST_EPOCH}, which no purge wrote: delete {EPOCHS!r}")
        self._merge(dict.fromkeys(scopes, epoch))
        await self._send_heartbeat()
        # Since when no member is missing that was there before: Redis forgets them if it is emptied or restarted.
        complete, known = time.monotonic(), set[bytes]()
        while True:
            now, *members = await self._run(_MEMBERS_NOW, str(int(_FORGET_SECONDS * 1000)))
            beats = {member: said.split() for member, said in zip(members[::2], members[1::2], strict=True)}
            behind = {member: int(now) - int(at) for member, (version, at) in beats.items() if int(version) < epoch}
            if not known <= beats.keys():
                complete = time.monotonic()
            known = set(beats)
            waited = time.monotonic() - start
            if time.monotonic() - complete >= _SETTLE_SECONDS and (
                not behind or (waited >= self._lease and min(behind.values()) > _SILENT_MS)
            ):
                return epoch, len(beats) - len(behind)
            if 1.0 <= waited < 1.0 + _BEAT_SECONDS / 4:
                log.warning("a purge waits for the confirmation of %s", ", ".join(map(repr, behind)))
            await asyncio.sleep(_BEAT_SECONDS / 4)

    async def _send_heartbeats(self) -> None:
        while True:
            try:
                await self._send_heartbeat()
            except UnavailableError as error:
                log.debug("no heartbeat was possible: %s", error.message)
            except Exception as error:
                # Continue after any failure: a disconnected process must not serve answers older than its lease.
                BACKGROUND.failed("purges", error)
            self._log_limit()
            await asyncio.sleep(_BEAT_SECONDS)

    async def _send_heartbeat(self) -> None:
        async with self._heartbeat_lock:
            before = time.monotonic()
            version, *flat = await self._run(_BEAT, self._member, str(self._version_read))
            scopes = dict(_scopes(flat))
            self._merge(scopes)
            if int(version) < self.epochs.version:
                # Redis lost epochs in a restart or a failover.
                await self._run(_MERGE, *_flat(self.epochs.scopes))
            self.is_known = True
            if flat:
                news = {scope for scope, epoch in scopes.items() if epoch > self._told.get(scope, 0)}
                if not await self.on_news(news):
                    return
                self._told = scopes
                await self._run(_BEAT, self._member, version.decode())
            self._version_read = int(version)
            # Not before the news are confirmed: a purge waits no longer than the lease for one that seems silent.
            self._contact = before

    def _log_limit(self) -> None:
        is_limited = self.oldest_ms > 0
        if is_limited and not self._said_limited:
            log.warning(
                "no heartbeat to Redis was completed for %.0f s: only recent answers are served",
                time.monotonic() - self._contact,
            )
        elif self._said_limited and not is_limited:
            log.info("heartbeats to Redis are completed again")
        self._said_limited = is_limited

    def _merge(self, scopes: Mapping[str, int]) -> None:
        epochs = self.epochs.merged(scopes)
        if epochs.scopes != self.epochs.scopes:
            self.epochs = epochs
            self.changed.set()
            self.changed = asyncio.Event()

    async def _run(self, script: str, *arguments: str) -> Any:
        assert self._shared is not None
        return await self._shared.run(EPOCHS, _COMMAND_SECONDS, "EVAL", script, 2, EPOCHS, _MEMBERS, *arguments)


async def _nothing(_: set[str]) -> bool:
    return True


def _scopes(flat: Sequence[bytes]) -> Iterator[tuple[str, int]]:
    """The scopes with a number; others were not written by a purge."""
    for scope, epoch in zip(flat[::2], flat[1::2], strict=True):
        if scope != b"version" and epoch.isdigit() and len(epoch) <= _MOST_DIGITS:
            yield scope.decode(errors="replace"), int(epoch)


def _flat(scopes: Mapping[str, int]) -> list[str]:
    return [text for scope, epoch in scopes.items() for text in (scope, str(epoch))]
