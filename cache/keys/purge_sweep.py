"""Removes purged answers from the local tier, so that they take no memory and its counters fall after a purge."""

from __future__ import annotations  # compiled by mypyc

import asyncio
from collections.abc import Callable, Iterable

from cache.keys.epochs import EVERYTHING
from cache.keys.invalidation import InvalidationLog
from cache.tiers.local_tier import MODEL_BYTES, LocalTier


class PurgeSweep:
    """Sweeps after purges of models and of everything. Answers of a purged tenant or key stay until they are evicted.

    `models` returns the (digest, name) of each model version that this process knows.
    """

    def __init__(
        self, local: LocalTier, purges: InvalidationLog, models: Callable[[], Iterable[tuple[bytes, str]]] = tuple
    ) -> None:
        self._local = local
        self._purges = purges
        self._models = models
        self._swept = purges.epochs

    async def keep_sweeping(self) -> None:
        """Sweeps after each purge, until cancelled."""
        while True:
            changed = self._purges.changed
            if self._purges.epochs is self._swept:
                await changed.wait()
            await self.sweep()

    async def sweep(self) -> None:
        """Removes the answers that purges since the last sweep cover, in parts between which other tasks run."""
        before, now = self._swept, self._purges.epochs
        models = list(self._models())
        current = {now.prefix(digest, name) for digest, name in models}
        stale = {before.prefix(digest, name) for digest, name in models} - current
        everything = now.scopes.get(EVERYTHING, 0) > before.scopes.get(EVERYTHING, 0)
        if stale or everything:
            for part in self._local.shards():
                for key, _ in part:
                    prefix = key[:MODEL_BYTES]
                    if prefix in stale or (everything and prefix not in current):
                        self._local.remove(key)
                await asyncio.sleep(0)
        self._swept = now
