"""Answers computed anew while the old ones are still given: off the path, and never many at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from services.runtime.errors import RingmeshError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 64
_REST_SECONDS = 1.0
# Another process has it in hand; its answer is soon in Redis.
_BUSY_SECONDS = 0.05

Renewed: TypeAlias = Literal["computed", "found", "busy", "failed"]


class Renewals:
    """One at a time for a key; what failed is left alone for a second. `counts` is by how they ended."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._running: set[asyncio.Task[None]] = set()
        self.counts: dict[Renewed, int] = {"computed": 0, "found": 0, "busy": 0, "failed": 0}

    def begin(self, key: bytes, work: Callable[[], Awaitable[Renewed]]) -> None:
        """Starts it, unless it runs, has just failed, or too many run. Then a later hit will."""
        if key in self._keys or len(self._running) >= _MOST_AT_ONCE:
            return
        self._keys.add(key)
        task = BACKGROUND.once("renewal", self._run(key, work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Ends what runs."""
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
