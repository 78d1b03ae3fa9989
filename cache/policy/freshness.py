"""How long an answer is given: while it is fresh, and for a while after that as a stale one.

Near the end of its freshness one caller renews it, picked at random, the sooner the longer computing takes (XFetch:
Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015).
"""

from __future__ import annotations  # compiled by mypyc

import math
from typing import NamedTuple


class Freshness(NamedTuple):
    """Milliseconds: fresh for `ttl_ms` from its computing on, and given for `stale_ms` more."""

    ttl_ms: int
    stale_ms: int = 0

    @property
    def kept_ms(self) -> int:
        """How long it is of any use."""
        return self.ttl_ms + self.stale_ms

    def is_young(self, created_at_ms: int, now_ms: float) -> bool:
        """Whether it is in the first half of its freshness, and nobody renews it yet."""
        return now_ms - created_at_ms < self.ttl_ms // 2

    def is_stale(self, created_at_ms: int, now_ms: float) -> bool:
        """Whether it is not fresh any more."""
        return now_ms - created_at_ms >= self.ttl_ms

    def is_over(self, created_at_ms: int, now_ms: float) -> bool:
        """Whether it is not to be given any more."""
        return now_ms - created_at_ms >= self.ttl_ms + self.stale_ms

    def is_due(self, created_at_ms: int, now_ms: float, compute_us: float, chance: float) -> bool:
        """Whether the caller with this `chance` is to renew it: not more often than twice in its time, at any rate."""
        return not self.is_young(created_at_ms, now_ms) and is_due(
            created_at_ms + self.ttl_ms, now_ms, compute_us, chance
        )


def is_due(fresh_until_ms: float, now_ms: float, compute_us: float, chance: float) -> bool:
    """Whether the caller with this `chance` (0 to 1, uniform) is to compute it anew: XFetch with beta 1."""
    return now_ms - compute_us / 1000 * math.log(max(chance, 1e-300)) >= fresh_until_ms


def tightest(one: Freshness | None, other: Freshness | None) -> Freshness | None:
    """What both allow; None where neither has an end."""
    if one is None or other is None:
        return one or other
    return Freshness(min(one.ttl_ms, other.ttl_ms), min(one.stale_ms, other.stale_ms))
