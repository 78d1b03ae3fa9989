"""Recomputes answers in the background while the old ones are still returned, with bounded concurrency."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, TypeAlias

from services.runtime.errors import RingmeshError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 64
_REST_SECONDS = 1.0
# Another process renews the answer, which is soon in Redis.
_BUSY_SECONDS = 0.05

Renewed: TypeAlias = Literal["computed", "found", "busy", "failed"]


class Renewals:
    """Runs at most one renewal per key. A failed key pauses for a second. `counts` has the number of each result."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._running: set[asyncio.Task[None]] = set()
        self.counts: dict[Renewed, int] = {"computed": 0, "found": 0, "busy": 0, "failed": 0}

    def begin(self, key: bytes, work: Callable[[], Awaitable[Renewed]]) -> None:
        """Starts a renewal, unless the key has one, it has just failed, or too many run. A later hit retries."""
        if key in self._keys or len(self._running) >= _MOST_AT_ONCE:
            return
        self._keys.add(key)
        task = BACKGROUND.once("renewal", partial(self._run, key, work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def close(self) -> None:
        for task in self._running:
            task.cancel()

    async def _run(self, key: bytes, work: Callable[[], Awaitable[Renewed]]) -> None:
        result: Renewed = "failed"
        try:
            result = await work()
        except RingmeshError as error:
            log.debug("an answer could not be renewed: %s", error.message)
        except Exception as error:
            BACKGROUND.failed("renewal", error)
        self.counts[result] += 1
        pause = {"failed": _REST_SECONDS, "busy": _BUSY_SECONDS}.get(result, 0.0)
        asyncio.get_running_loop().call_later(pause, self._keys.discard, key)
