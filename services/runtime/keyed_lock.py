"""Locks by key, which come and go with those that hold or wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class KeyedLock:
    """For each key one holder at a time, in the order of asking."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._asked: dict[Hashable, int] = {}

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        """Waits until it is this one's turn."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._asked[key] = self._asked.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._asked[key] -= 1
            if not self._asked[key]:
                del self._locks[key], self._asked[key]

    def __len__(self) -> int:
        """Keys held or waited for."""
        return len(self._locks)
