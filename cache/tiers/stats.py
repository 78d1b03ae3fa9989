"""Counters of one cache tier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TierCounters:
    """Counts since the process started; `entries` and `bytes` are current values."""

    tier: str
    hits: int = 0
    misses: int = 0
    fills: int = 0
    evictions: int = 0
    # Failed look-ups and fills: the tier was down, slow, or held a damaged value.
    failures: int = 0
    entries: int = 0
    bytes: int = 0
    # Compute time that hits saved.
    saved_compute_us: int = 0
