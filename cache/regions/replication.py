"""Copies the most valuable answers of peer regions into this region's shared tier, within a byte budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

from cache.regions.peer_regions import FAILURES, PeerRegion
from cache.tiers.shared_tier import SharedTier
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_ROUND_SECONDS = 10.0
_AT_ONCE = 32
_MAX_KNOWN = 100_000


class Replication:
    """Copies from `peers` to `shared`, at most `bytes_per_second` on average from all peers together."""

    def __init__(self, peers: Sequence[PeerRegion], shared: SharedTier, bytes_per_second: int) -> None:
        self._peers = peers
        self._shared = shared
        self._bytes_per_second = bytes_per_second
        # Keys that were checked: already in this region, copied, or no longer at the peer.
        self._known: set[bytes] = set()
        self._task: asyncio.Task[None] | None = None
        self.bytes = 0

    def start(self) -> None:
        """Starts copying."""
        self._task = BACKGROUND.start("replication", self._copy_on)

    def close(self) -> None:
        """Stops copying."""
        if self._task is not None:
            self._task.cancel()

    async def _copy_on(self) -> None:
        while True:
            for peer in self._peers:
                if peer.is_up:
                    try:
                        await self._copy(peer)
                    except FAILURES as error:
                        log.debug("copying from %s ended: %r", peer.region, error)
            await asyncio.sleep(_ROUND_SECONDS)

    async def _copy(self, peer: PeerRegion) -> None:
        keys = [key for key in await peer.valuable() if key not in self._known]
        for part in _parts(keys):
            here = await asyncio.gather(*map(self._shared.get, part))
            missing = [key for key, entry in zip(part, here, strict=True) if entry is None]
            size = 0
            for key, entry in zip(missing, await peer.get_many(missing), strict=True):
                if entry is not None:
                    self._shared.put(key, entry)
                    size += len(entry.value)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known.update(part)
            self.bytes += size
            await asyncio.sleep(size / self._bytes_per_second)


def _parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]
