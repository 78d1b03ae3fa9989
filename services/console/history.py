"""A bounded history of metrics in memory, and the few questions that the pages ask of it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Labels: TypeAlias = tuple[str, ...]
Floats: TypeAlias = npt.NDArray[np.float64]

KEPT_SAMPLES = 900
MAX_SERIES = 4000
_TRIM = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """The value of one series at one scrape; a histogram's buckets are series of their own, with the label `le`."""

    name: str
    labels: Mapping[str, str]
    value: float


class _Series:
    __slots__ = ("labels", "missed", "values")

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = labels
        # Ends where the target's times do; before its first value there is nothing.
        self.values = array("d")
        # Scrapes since it was last seen.
        self.missed = 0


class _Target:
    __slots__ = ("by_name", "count", "refused", "times")

    def __init__(self) -> None:
        self.times = array("d")
        self.by_name: dict[str, dict[tuple[tuple[str, str], ...], _Series]] = {}
        self.count = 0
        self.refused = 0


@dataclass(frozen=True, slots=True)
class Curve:
    """A value over time; NaN where nothing is known. `times` are the ends of the steps, in seconds since the epoch."""

    times: Sequence[float]
    values: Sequence[float]


class History:
    """The last scrapes of every target. `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._targets: dict[str, _Target] = {}

    def add(self, target: str, samples: Sequence[Sample]) -> None:
        """One scrape. Beyond MAX_SERIES a target's series are not kept, and counted in `refused`."""
        kept = self._targets.setdefault(target, _Target())
        kept.times.append(self._clock())
        kept.refused = 0
        for family in kept.by_name.values():
            for known in family.values():
                known.missed += 1
        for sample in samples:
            family = kept.by_name.setdefault(sample.name, {})
            key = tuple(sorted(sample.labels.items()))
            series = family.get(key)
            if series is None:
                if kept.count >= MAX_SERIES:
                    kept.refused += 1
                    continue
                kept.count += 1
                series = family[key] = _Series({**sample.labels, "target": target})
            series.values.append(sample.value)
            series.missed = 0
        for family in kept.by_name.values():
            for key in [key for key, series in family.items() if series.missed >= KEPT_SAMPLES]:
                del family[key]
                kept.count -= 1
            for known in family.values():
                if known.missed:
                    known.values.append(math.nan)
                _trim(known.values)
        _trim(kept.times)

    def refused(self) -> int:
        """Series of the last scrapes that there was no room for."""
        return sum(target.refused for target in self._targets.values())

    def knows(self, name: str) -> bool:
        """Whether any target has this metric."""
        return any(target.by_name.get(name) for target in self._targets.values())

    def last(self, name: str, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """The newest values, summed by the labels `by`; what was not in the target's last scrape is left out."""
        out: dict[Labels, float] = {}
        for _, series in self._matching(name, where):
            value = series.values[-1]
            if not math.isnan(value):
                key = _key(series, by)
                out[key] = out.get(key, 0.0) + value
        return out

    def increase(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """By how much counters grew within the last `seconds`; a restarted process counts from 0."""
        out: dict[Labels, float] = {}
        for _, matching, grown in self._grown(name, where, self._clock() - seconds):
            for series, total in zip(matching, grown.sum(axis=1).tolist(), strict=True):
                key = _key(series, by)
                out[key] = out.get(key, 0.0) + total
        return out

    def rate(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """As `increase`, a second; over the time that was really watched where that is less."""
        watched = self.watched(seconds)
        return {key: grown / watched for key, grown in self.increase(name, seconds, by, **where).items()}

    def watched(self, seconds: float) -> float:
        """How much of the last `seconds` is known."""
        first = min((target.times[0] for target in self._targets.values() if target.times), default=self._clock())
        return min(seconds, max(1.0, self._clock() - first))

    def quantile(
        self, q: float, name: str, seconds: float, by: Sequence[str] = (), **where: str
    ) -> dict[Labels, float]:
        """Of a histogram over the last `seconds`, interpolated within a bucket; without what saw nothing."""
        counts: dict[Labels, dict[float, float]] = {}
        for key, grown in self.increase(f"{name}_bucket", seconds, (*by, "le"), **where).items():
            counts.setdefault(key[:-1], {})[float(key[-1])] = grown
        found = {key: _quantile(q, buckets) for key, buckets in counts.items()}
        return {key: value for key, value in found.items() if not math.isnan(value)}

    def rates(self, name: str, seconds: float, step: float, **where: str) -> Curve:
        """The growth a second of all matching counters together, step by step."""
        edges = self._edges(seconds, step)
        total = np.zeros(len(edges) - 1)
        seen = np.zeros(len(edges) - 1, bool)
        for times, _, grown in self._grown(name, where, edges[0]):
            total += _binned(times, grown, edges).sum(axis=0)
            seen |= np.histogram(times, edges)[0] > 0
        return Curve(edges[1:].tolist(), np.where(seen, total / step, math.nan).tolist())

    def quantiles(self, qs: Sequence[float], name: str, seconds: float, step: float, **where: str) -> list[Curve]:
        """Quantiles of a histogram step by step, a curve for each of `qs`; NaN where nothing was observed."""
        edges = self._edges(seconds, step)
        buckets: dict[float, Floats] = {}
        for times, matching, grown in self._grown(f"{name}_bucket", where, edges[0]):
            for series, counts in zip(matching, _binned(times, grown, edges), strict=True):
                bound = float(series.labels["le"])
                buckets[bound] = buckets[bound] + counts if bound in buckets else counts
        steps = [{bound: counts[i] for bound, counts in buckets.items()} for i in range(len(edges) - 1)]
        return [Curve(edges[1:].tolist(), [_quantile(q, counts) for counts in steps]) for q in qs]

    def gauge(self, name: str, seconds: float, step: float, **where: str) -> Curve:
        """The sum of all matching gauges, the mean of each step."""
        edges = self._edges(seconds, step)
        total = np.zeros(len(edges) - 1)
        seen = np.zeros(len(edges) - 1, bool)
        for target, series in self._matching(name, where):
            values = np.frombuffer(series.values)[-len(target.times) :]
            at = np.frombuffer(target.times)[-len(values) :]
            known = ~np.isnan(values)
            count = np.histogram(at[known], edges)[0]
            total += np.histogram(at[known], edges, weights=values[known])[0] / np.maximum(count, 1)
            seen |= count > 0
        return Curve(edges[1:].tolist(), np.where(seen, total, math.nan).tolist())

    def _edges(self, seconds: float, step: float) -> Floats:
        # On whole steps, so that a curve moves and does not shimmer.
        end = math.floor(self._clock() / step) * step
        return end - step * np.arange(round(seconds / step), -1, -1, dtype=np.float64)

    def _matching(self, name: str, where: Mapping[str, str]) -> Iterator[tuple[_Target, _Series]]:
        for target in self._targets.values():
            for series in target.by_name.get(name, {}).values():
                if all(series.labels.get(label) == value for label, value in where.items()):
                    yield target, series

    def _grown(
        self, name: str, where: Mapping[str, str], since: float
    ) -> Iterator[tuple[Floats, list[_Series], Floats]]:
        """Target by target: the scrapes after `since`, the series that match, and what each grew by at each scrape."""
        for target, pairs in groupby(self._matching(name, where), lambda pair: pair[0]):
            matching = [series for _, series in pairs]
            times = np.frombuffer(target.times)
            first = int(np.searchsorted(times, since, "right"))
            count = len(times) - first
            if not count:
                continue
            # One column more than asked for: what the first scrape is compared with.
            block = np.full((len(matching), count + 1), math.nan)
            for row, series in zip(block, matching, strict=True):
                tail = np.frombuffer(series.values)[-min(count + 1, len(times)) :]
                row[count + 1 - len(tail) :] = tail
            grown = np.diff(block, axis=1)
            grown = np.where(grown < 0, block[:, 1:], grown)
            for index in np.flatnonzero(np.isnan(grown).any(axis=1)):
                grown[index] = _bridged(target, matching[index])[first:]
            yield times[first:], matching, grown


def _trim(values: array[float]) -> None:
    if len(values) >= KEPT_SAMPLES + _TRIM:
        del values[:_TRIM]


def _key(series: _Series, by: Sequence[str]) -> Labels:
    return tuple(series.labels.get(label, "") for label in by)


def _bridged(target: _Target, series: _Series) -> Floats:
    """What a series with gaps grew by at each scrape; one that appears after the first scrape began at 0."""
    values = np.frombuffer(series.values)[-len(target.times) :]
    grown = np.zeros(len(target.times))
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return grown
    offset = len(target.times) - len(values)
    first = values[known[0]] if offset + known[0] > 0 and len(series.values) <= KEPT_SAMPLES else 0.0
    steps = np.diff(values[known])
    grown[offset + known] = np.concatenate(([first], np.where(steps < 0, values[known[1:]], steps)))
    return grown


def _binned(times: Floats, grown: Floats, edges: Floats) -> Floats:
    """Sums of `grown` between the edges, row by row."""
    sums = np.concatenate((np.zeros((len(grown), 1)), np.cumsum(grown, axis=1)), axis=1)
    places = np.searchsorted(times, edges, "right")
    return sums[:, places[1:]] - sums[:, places[:-1]]


def _quantile(q: float, cumulative: Mapping[float, float]) -> float:
    """As Prometheus's histogram_quantile: linear within a bucket, the last finite bound beyond it; NaN of nothing."""
    bounds = sorted(cumulative)
    if not bounds or cumulative[bounds[-1]] <= 0:
        return math.nan
    rank = q * cumulative[bounds[-1]]
    below, lower = 0.0, 0.0
    for bound in bounds:
        if cumulative[bound] >= rank:
            if math.isinf(bound):
                return lower
            inside = cumulative[bound] - below
            return lower + (bound - lower) * ((rank - below) / inside if inside else 1.0)
        below, lower = cumulative[bound], bound
    return lower
