"""Freshness: how long an answer is returned as fresh, and after that as stale.

Near the end of the TTL one randomly chosen caller renews the answer, earlier if computing takes longer (XFetch:
Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015).
"""

from __future__ import annotations  # compiled by mypyc

import math
from typing import NamedTuple


class Freshness(NamedTuple):
    """An answer is fresh for `ttl_ms` milliseconds after it was computed, and stale for another `stale_ms`."""

    ttl_ms: int
    stale_ms: int = 0

    @property
    def kept_ms(self) -> int:
        """How long an answer can be returned at all."""
        return self.ttl_ms + self.stale_ms

    def is_young(self, created_at_ms: int, now_ms: float) -> bool:
        """Whether the answer is in the first half of its TTL, in which it is never renewed."""
        return now_ms - created_at_ms < self.ttl_ms // 2

    def is_stale(self, created_at_ms: int, now_ms: float) -> bool:
        return now_ms - created_at_ms >= self.ttl_ms

    def is_over(self, created_at_ms: int, now_ms: float) -> bool:
        """Whether the answer is too old to be returned even as stale."""
        return now_ms - created_at_ms >= self.ttl_ms + self.stale_ms

    def is_due(self, created_at_ms: int, now_ms: float, compute_us: float, chance: float) -> bool:
        """Whether the caller with this `chance` renews the answer: never in the first half of the TTL.

        The answer is therefore renewed at most twice per TTL.
        """
        return not self.is_young(created_at_ms, now_ms) and is_due(
            created_at_ms + self.ttl_ms, now_ms, compute_us, chance
        )


def is_due(fresh_until_ms: float, now_ms: float, compute_us: float, chance: float) -> bool:
    """Whether the caller with this `chance` (uniform in 0 to 1) recomputes the value: XFetch with beta 1."""
    return now_ms - compute_us / 1000 * math.log(max(chance, 1e-300)) >= fresh_until_ms


def tightest(one: Freshness | None, other: Freshness | None) -> Freshness | None:
    """The shorter TTL and stale time of both; None if neither expires."""
    if one is None or other is None:
        return one or other
    return Freshness(min(one.ttl_ms, other.ttl_ms), min(one.stale_ms, other.stale_ms))
