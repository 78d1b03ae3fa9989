"""Requests replayed against a number of servers, first come, first served, in batches as large as a model allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import NamedTuple

MOST_SERVERS = 1024


class ReplayedRequest(NamedTuple):
    """A request that was computed: when it came in microseconds, its model, and how much longer than usual it takes."""

    arrived_us: int
    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RunTime:
    """How long a model runs, in microseconds: `fixed`, and `each` request more; `most` requests at a time."""

    fixed: float
    each: float
    most: int = 1

    def share(self, requests: int) -> float:
        """Of each, in a run of so many."""
        return self.fixed / requests + self.each


class Replay(NamedTuple):
    """Of each request, in the order of arrival, the time until its run ended; and for how long servers ran."""

    latencies_us: list[int]
    busy_us: int


def fitted(runs: Sequence[tuple[int, int]]) -> RunTime:
    """From what a model's requests were charged in runs of how many, as (requests, microseconds). Least squares."""
    sizes = [1 / requests for requests, _ in runs]
    mean = sum(sizes) / len(runs)
    usual = sum(us for _, us in runs) / len(runs)
    spread = sum((size - mean) ** 2 for size in sizes)
    slope = sum((size - mean) * us for size, (_, us) in zip(sizes, runs, strict=True)) / spread if spread else 0.0
    # A share is no larger in a larger run, and never negative.
    fixed = min(max(slope, 0.0), usual / mean)
    return RunTime(fixed, max(usual - fixed * mean, 0.0), max(requests for requests, _ in runs))


def replay(work: Sequence[ReplayedRequest], servers: int, times: Mapping[str, RunTime]) -> Replay:
    """`work` is in the order of arrival. A server that is free runs the model whose request waits longest."""
    free = [0] * servers
    waiting: dict[str, deque[int]] = {}
    found = [0] * len(work)
    now = come = busy = 0
    while come < len(work) or waiting:
        now = max(now, free[0])
        if not waiting:
            now = max(now, work[come].arrived_us)
        while come < len(work) and work[come].arrived_us <= now:
            waiting.setdefault(work[come].model, deque()).append(come)
            come += 1
        model = min(waiting, key=lambda name: waiting[name][0])
        queue, time = waiting[model], times[model]
        run = [queue.popleft() for _ in range(min(len(queue), time.most))]
        if not queue:
            del waiting[model]
        took = round(time.share(len(run)) * sum(work[place].weight for place in run))
        heapreplace(free, now + took)
        busy += took
        for place in run:
            found[place] = now + took - work[place].arrived_us
    return Replay(found, busy)


def percentile_99(values: Sequence[int]) -> int:
    """0 of nothing."""
    return sorted(values)[len(values) * 99 // 100] if values else 0


def needed(
    work: Sequence[ReplayedRequest], latency_us: int, slots: int, span_us: int, times: Mapping[str, RunTime]
) -> tuple[int, int]:
    """The fewest workers of `slots` servers each with which the 99th percentile of latency is at most `latency_us`.

    Returns that percentile, too. Where no number is enough, because the runs alone take longer: the workers with which
    nobody waits longer than that.
    """
    if not work:
        return 0, 0
    alone = percentile_99([round(times[one.model].share(1) * one.weight) for one in work])
    bound = latency_us if alone <= latency_us else alone + latency_us

    def latency(workers: int) -> int:
        return percentile_99(replay(work, workers * slots, times).latencies_us)

    # Fewer could not finish what comes in the time, in the largest runs.
    least = sum(times[one.model].share(times[one.model].most) * one.weight for one in work)
    low = high = max(1, int(least / (span_us * slots)))
    while (best := latency(high)) > bound and high * slots < MOST_SERVERS:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        found = latency(middle)
        if found <= bound:
            high, best = middle, found
        else:
            low = middle + 1
    return high, best
