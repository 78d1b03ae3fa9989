"""Plain counters of one tier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TierCounters:
    """Counts since the process started, but for `entries` and `bytes`, which are what is held now."""

    tier: str
    hits: int = 0
    misses: int = 0
    fills: int = 0
    evictions: int = 0
    # Look-ups and fills given up: the tier was down, slow, or held a damaged value.
    failures: int = 0
    entries: int = 0
    bytes: int = 0
    # Compute time that hits made unnecessary.
    saved_compute_us: int = 0
