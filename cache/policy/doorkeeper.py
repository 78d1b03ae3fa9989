"""Admission to Redis: answers that are requested only once are not written.

A computed answer waits here for a while. It is written if the local tier has a hit on it, and discarded otherwise.
Waiting answers are checked periodically, so that a hit itself costs nothing extra.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections import deque
from typing import NamedTuple

from cache.tiers.entry import Entry
from cache.tiers.shared_tier import SharedTier
from services.runtime.telemetry.supervisor import BACKGROUND

_LOOK_SECONDS = 0.5
_WAIT_SECONDS = 60.0
_MAX_WAITING_BYTES = 64 << 20
_MAX_WAITING = 20_000


class _Waiting(NamedTuple):
    until: float
    key: bytes
    entry: Entry
    kept_ms: int | None


class Doorkeeper:
    """Writes answers to `shared` if they are requested again within a minute."""

    def __init__(self, shared: SharedTier) -> None:
        self._shared = shared
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = BACKGROUND.every(_LOOK_SECONDS, "doorkeeper", self.look)

    def offer(self, key: bytes, entry: Entry, kept_ms: int | None = None) -> None:
        """Queues an answer, with the arguments of SharedTier.put. Discards the oldest if the queue is full."""
        self._waiting.append(_Waiting(time.monotonic() + _WAIT_SECONDS, key, entry, kept_ms))
        self._bytes += len(entry.value)
        while self._bytes > _MAX_WAITING_BYTES or len(self._waiting) > _MAX_WAITING:
            self._bytes -= len(self._waiting.popleft().entry.value)

    def look(self) -> None:
        """Writes answers that have had a hit, and discards answers that have waited too long."""
        now = time.monotonic()
        still: deque[_Waiting] = deque()
        size = 0
        for waiting in self._waiting:
            if waiting.entry.hits:
                self._shared.put(waiting.key, waiting.entry, waiting.kept_ms)
            elif now < waiting.until:
                still.append(waiting)
                size += len(waiting.entry.value)
        self._waiting, self._bytes = still, size

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.look()
