"""Metrics: families with their labels, and sources that are read only at a scrape.

Code counts events in plain ints of its own: a label look-up, a lock or an object for each request would cost too much
on a cache hit. A source turns those ints into samples at a scrape.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

# Further label values are counted under this one, so that callers cannot create unlimited series.
OTHER = "other"
_MAX_SERIES = 500


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its Prometheus name, its type, its meaning, and its labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()


class Exemplar(NamedTuple):
    """The trace of one observation in a bucket; `value` in the histogram's unit, `at` in seconds since the epoch."""

    trace_id: str
    value: float
    at: float


class Buckets(NamedTuple):
    """Contents of a histogram: `counts`, not cumulative, has one more than `bounds` (upper ends, inclusive)."""

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float
    exemplars: Sequence[Exemplar | None] = ()


class Sample(NamedTuple):
    """The current value of one series; `labels` are in the order of the family's."""

    family: Family
    labels: tuple[str, ...]
    value: float | Buckets


Source: TypeAlias = Callable[[], Iterable[Sample]]


class Metrics:
    """The sources of one process."""

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._slow_sources: list[Source] = []

    def add(self, source: Source) -> None:
        """Adds a source that is read on the event loop, so it must be fast."""
        self._sources.append(source)

    def add_slow(self, source: Source) -> None:
        """Adds a source that calls the operating system; it is read on a thread."""
        self._slow_sources.append(source)

    async def collect(self) -> list[Sample]:
        samples = [sample for source in self._sources for sample in source()]
        samples += await asyncio.to_thread(lambda: [sample for source in self._slow_sources for sample in source()])
        return samples


class Counter:
    """A counter, or a gauge, by labels, for events that occur at most thousands of times a second."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._values: dict[tuple[str, ...], float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        """Adds `by` to a series; new series beyond _MAX_SERIES are counted under `other`."""
        if labels not in self._values and len(self._values) >= _MAX_SERIES:
            labels = (OTHER,) * len(labels)
        self._values[labels] = self._values.get(labels, 0) + by

    def samples(self) -> Iterator[Sample]:
        return (Sample(self._family, labels, value) for labels, value in self._values.items())


def _decades(first: int, last: int) -> tuple[int, ...]:
    """Returns bounds in nanoseconds, six to a decade, from 10**first to 10**last."""
    steps = (10, 15, 20, 30, 50, 70)
    return (*(step * 10 ** (power - 1) for power in range(first, last) for step in steps), 10**last)


# From 10 us, a fourth of a cache hit, to 100 s.
BOUNDS_NS = _decades(4, 11)
BOUNDS_SECONDS = tuple(bound / 1e9 for bound in BOUNDS_NS)


class Histogram:
    """Durations, in buckets whose upper end is at most 1.67 times the lower one."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.sum_ns = 0

    def observe(self, ns: int, times: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_NS, ns)] += times
        self.sum_ns += ns * times

    def buckets(self) -> Buckets:
        return Buckets(BOUNDS_SECONDS, tuple(self.counts), self.sum_ns / 1e9)
