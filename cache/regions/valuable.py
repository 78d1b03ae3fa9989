"""The answers that save a region most compute time, in one sorted set in Redis.

Each process periodically reports the most valuable entries of its local tier. A new process warms up from the set, and
peer regions copy it. The value of an entry is its hits times its compute time, per byte.
"""

from __future__ import annotations

import asyncio
import logging
from heapq import nlargest
from typing import Any

from cache.keys.keys import KEY_BYTES
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from cache.tiers.shared_tier import SharedTier
from services.runtime.errors import UnavailableError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_NAME = b"{rm1-mesh}:valuable"
_REPORT_SECONDS = 30.0
_REPORTED = 1000
_KEPT = 10_000
_KEPT_SECONDS = 7 * 86400
_COMMAND_SECONDS = 2.0
_GET = 256

# ARGV: maximum number of keys, TTL in seconds, then alternating values and keys. Earlier values decay by a tenth.
_REPORT = """
redis.call('ZUNIONSTORE', KEYS[1], 1, KEYS[1], 'WEIGHTS', 0.9)
for i = 3, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'GT', ARGV[i], ARGV[i + 1]) end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -(ARGV[1] + 1))
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


class Valuable:
    """Reports the most valuable entries of `local`, and warms `local` with those of the region."""

    def __init__(self, local: LocalTier, shared: SharedTier) -> None:
        self._local = local
        self._shared = shared
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = BACKGROUND.start("valuable entries", self._report_on)

    async def close(self) -> None:
        """Reports once more, so that the next process can warm up from this one's entries."""
        if self._task is not None:
            self._task.cancel()
            await self.report()

    async def report(self) -> None:
        """Reports the most valuable entries. Does nothing if Redis is unreachable."""
        best: list[tuple[float, bytes]] = []
        for shard in self._local.shards():
            best += [(_worth(entry), key) for key, entry in shard if entry.hits]
            if len(best) > 4 * _REPORTED:
                best = nlargest(_REPORTED, best)
            await asyncio.sleep(0)
        if not best:
            return
        flat = [part for worth, key in nlargest(_REPORTED, best) for part in (repr(worth), key)]
        try:
            await self._run("EVAL", _REPORT, 1, _NAME, _KEPT, _KEPT_SECONDS, *flat)
        except UnavailableError as error:
            log.debug("the most valuable entries could not be reported: %s", error.message)

    async def keys(self, limit: int) -> list[bytes]:
        """Returns up to `limit` keys, the most valuable first. Raises UnavailableError."""
        found: list[bytes] = await self._run("ZREVRANGE", _NAME, 0, limit - 1)
        # A peer refuses the whole list if one item is not a key, and anyone with access to Redis can have added one.
        return [key for key in found if len(key) == KEY_BYTES]

    async def warm(self, keys: list[bytes], max_bytes: int) -> tuple[int, int]:
        """Copies entries from the shared tier into the local tier. Returns their number and bytes."""
        count = size = 0
        for start in range(0, len(keys), _GET):
            part = keys[start : start + _GET]
            for key, entry in zip(part, await asyncio.gather(*map(self._shared.get_answer, part)), strict=True):
                if entry is None or size + len(entry.value) > max_bytes:
                    continue
                self._local.put(key, entry)
                count += 1
                size += len(entry.value)
        return count, size

    async def _report_on(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            await self.report()

    async def _run(self, *command: str | bytes | int) -> Any:
        return await self._shared.run(_NAME, _COMMAND_SECONDS, *command)


def _worth(entry: Entry) -> float:
    return float(entry.hits * entry.compute_us / (len(entry.value) + 1))
