"""Copies the most valuable answers of peer regions into this region's shared tier, within a byte budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cache.regions.peer_regions import FAILURES, PeerRegion
from cache.tiers.shared_tier import SharedTier

log = logging.getLogger(__name__)

_ROUND_SECONDS = 10.0
_AT_ONCE = 32
_MAX_KNOWN = 100_000


async def replicate(peers: Sequence[PeerRegion], shared: SharedTier, bytes_per_second: int) -> None:
    """Copies until it is cancelled, at most `bytes_per_second` on average from all peers together."""
    # Keys that were checked: already in this region, copied, or no longer at the peer.
    known: set[bytes] = set()
    while True:
        for peer in peers:
            if peer.is_up:
                try:
                    await _copy(peer, shared, bytes_per_second, known)
                except FAILURES as error:
                    log.debug("copying from %s ended: %r", peer.region, error)
        await asyncio.sleep(_ROUND_SECONDS)


async def _copy(peer: PeerRegion, shared: SharedTier, bytes_per_second: int, known: set[bytes]) -> None:
    keys = [key for key in await peer.valuable() if key not in known]
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        here = await asyncio.gather(*map(shared.get, part))
        missing = [key for key, entry in zip(part, here, strict=True) if entry is None]
        size = 0
        for key, entry in zip(missing, await peer.get_many(missing), strict=True):
            if entry is not None:
                shared.put(key, entry)
                size += len(entry.value)
        if len(known) >= _MAX_KNOWN:
            known.clear()
        known.update(part)
        await asyncio.sleep(size / bytes_per_second)
