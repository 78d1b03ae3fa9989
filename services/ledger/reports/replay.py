"""Requests replayed against a number of servers, first come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from typing import NamedTuple

MOST_SERVERS = 1024


class Work(NamedTuple):
    """A request that was computed: when it came, and for how long it ran, in microseconds."""

    arrived_us: int
    service_us: int


def waits(work: Sequence[Work], servers: int) -> list[int]:
    """How long each of `work`, in the order of arrival, waits for one of `servers`, in microseconds."""
    free = [0] * servers
    found = []
    for arrived, service in work:
        start = max(arrived, free[0])
        heapreplace(free, start + service)
        found.append(start - arrived)
    return found


def percentile_99(values: Sequence[int]) -> int:
    """0 of nothing."""
    return sorted(values)[len(values) * 99 // 100] if values else 0


def needed(work: Sequence[Work], wait_us: int, slots: int, span_us: int) -> tuple[int, int]:
    """The fewest workers of `slots` servers each for which the 99th percentile of waiting is at most `wait_us`; and it.

    More servers than requests at a time help nobody, so there are always some that do.
    """
    if not work:
        return 0, 0
    # Fewer could not finish what comes in the time.
    low = max(1, sum(service for _, service in work) // (span_us * slots))
    high = low
    while (found := percentile_99(waits(work, high * slots))) > wait_us and high * slots < MOST_SERVERS:
        low, high = high + 1, 2 * high
    best = found
    while low < high:
        middle = (low + high) // 2
        found = percentile_99(waits(work, middle * slots))
        if found <= wait_us:
            high, best = middle, found
        else:
            low = middle + 1
    return high, best
