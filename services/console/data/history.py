"""A bounded history of metrics in memory, and the few questions that the pages ask of it.

A scrape is a row of a table for each metric of a process, so that a question is a few operations on arrays, however
many series it is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Labels: TypeAlias = tuple[str, ...]
Floats: TypeAlias = npt.NDArray[np.float64]
Places: TypeAlias = npt.NDArray[np.intp]

# Every scrape of the last two minutes is kept, then one in ten seconds, for half an hour.
KEPT_SECONDS = 1810.0
MAX_SCRAPES = 384
# Of one process, and of all.
MAX_SERIES = 12_000
MAX_ALL_SERIES = 60_000
_WHOLE_SECONDS = 130.0
_THINNED_SECONDS = 10.0


class Sample(NamedTuple):
    """The value of one series at one scrape; a histogram's buckets are series of their own, with the label `le`.

    It is quickest where `labels` is the same object at each scrape.
    """

    name: str
    labels: Mapping[str, str]
    value: float


class _Table:
    """The series of one metric of one process, a column each; NaN where a scrape did not have it."""

    def __init__(self, target: str) -> None:
        self.labels: list[Mapping[str, str]] = []
        self.columns: dict[tuple[tuple[str, str], ...], int] = {}
        # When each came, where that was after the first scrape: it began at 0 then. Else NaN.
        self.born: list[float] = []
        # Only rows that a scrape has filled are touched, and so take memory.
        self.values: Floats = np.empty((MAX_SCRAPES, 4))
        self._target = target
        self._selected: dict[tuple[tuple[str, str], ...], Places] = {}
        self._groups: dict[Labels, tuple[list[Labels], Places]] = {}

    def add(self, key: tuple[tuple[str, str], ...], labels: Mapping[str, str], row: int, now: float) -> int:
        """A series that is new in this row; its column."""
        column = self.columns[key] = len(self.labels)
        self.labels.append({**labels, "target": self._target})
        self.born.append(now if row else math.nan)
        if column == self.values.shape[1]:
            wider = np.empty((MAX_SCRAPES, column * 3 // 2))
            wider[:row, :column] = self.values[:row]
            self.values = wider
        self.values[:row, column] = math.nan
        self._forget()
        return column

    def thin(self, kept: Places) -> int:
        """Keeps these scrapes, and the series that are in one of them; how many series went."""
        before = len(self.labels)
        rows = self.values[kept]
        columns = np.flatnonzero(~np.isnan(rows[:, :before]).all(axis=0))
        self.values = np.empty((MAX_SCRAPES, max(4, len(columns))))
        self.values[: len(kept), : len(columns)] = rows[:, columns]
        if len(columns) < before:
            moved = {old: new for new, old in enumerate(columns.tolist())}
            self.labels = [self.labels[old] for old in moved]
            self.born = [self.born[old] for old in moved]
            self.columns = {key: moved[old] for key, old in self.columns.items() if old in moved}
            self._forget()
        return before - len(columns)

    def select(self, where: Mapping[str, str]) -> Places:
        """The columns with these labels."""
        key = tuple(sorted(where.items()))
        found = self._selected.get(key)
        if found is None:
            matching = [
                column
                for column, labels in enumerate(self.labels)
                if all(labels.get(label) == value for label, value in key)
            ]
            found = self._selected[key] = np.array(matching, np.intp)
        return found

    def groups(self, by: Sequence[str]) -> tuple[list[Labels], Places]:
        """The values of the labels `by`, and of which of them each column is."""
        by = tuple(by)
        found = self._groups.get(by)
        if found is None:
            keys: dict[Labels, int] = {}
            places = [
                keys.setdefault(tuple([labels.get(label, "") for label in by]), len(keys)) for labels in self.labels
            ]
            found = self._groups[by] = (list(keys), np.array(places, np.intp))
        return found

    def _forget(self) -> None:
        self._selected.clear()
        self._groups.clear()


class _Target:
    """The scrapes of one process."""

    def __init__(self) -> None:
        self.times: Floats = np.empty(MAX_SCRAPES)
        self.count = 0
        self.series = 0
        self.refused = 0
        self.tables: dict[str, _Table] = {}
        # By the identity of a sample's labels, which are held so that it stays theirs.
        self.known: dict[int, tuple[Mapping[str, str], str, _Table, int]] = {}

    def thin(self, now: float) -> None:
        """Makes room for more scrapes."""
        times = self.times[: self.count]
        bins = np.ceil(times / _THINNED_SECONDS)
        last_of_bin = np.append(bins[1:] != bins[:-1], True)
        kept = np.flatnonzero(((times > now - _WHOLE_SECONDS) | last_of_bin) & (times > now - KEPT_SECONDS))
        kept = kept[-MAX_SCRAPES // 2 :] if len(kept) > MAX_SCRAPES * 3 // 4 else kept
        self.series -= sum(table.thin(kept) for table in self.tables.values())
        self.tables = {name: table for name, table in self.tables.items() if table.labels}
        self.times[: len(kept)] = times[kept]
        self.count = len(kept)
        self.known.clear()


@dataclass(frozen=True, slots=True)
class Curve:
    """A value over time; NaN where nothing is known. `times` are the ends of the steps, in seconds since the epoch."""

    times: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart. The first of a chart is drawn full, those after it dashed."""

    label: str
    curve: Curve

    @property
    def now(self) -> float:
        """The last value that is known; NaN where none is."""
        return next((value for value in reversed(self.curve.values) if not math.isnan(value)), math.nan)


class History:
    """The last scrapes of every target. `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._targets: dict[str, _Target] = {}

    def add(self, target: str, samples: Sequence[Sample]) -> None:
        """One scrape. Series beyond MAX_SERIES of a target, and MAX_ALL_SERIES, are not kept; `refused` counts them."""
        kept = self._targets.setdefault(target, _Target())
        now = self._clock()
        if kept.count == MAX_SCRAPES:
            kept.thin(now)
        row = kept.count
        kept.times[row] = now
        kept.refused = 0
        room = min(MAX_SERIES - kept.series, MAX_ALL_SERIES - sum(each.series for each in self._targets.values()))
        found: dict[int, tuple[_Table, list[int], list[float]]] = {}
        for name, labels, value in samples:
            known = kept.known.get(id(labels))
            if known is None or known[1] != name:
                key = tuple(sorted(labels.items()))
                table = kept.tables.get(name)
                if table is None:
                    table = kept.tables[name] = _Table(target)
                column = table.columns.get(key)
                if column is None:
                    if not room:
                        kept.refused += 1
                        continue
                    room -= 1
                    kept.series += 1
                    column = table.add(key, labels, row, now)
                if len(kept.known) > 2 * MAX_SERIES:
                    kept.known.clear()
                known = kept.known[id(labels)] = (labels, name, table, column)
            _, _, table, column = known
            of_table = found.get(id(table))
            if of_table is None:
                of_table = found[id(table)] = (table, [], [])
            of_table[1].append(column)
            of_table[2].append(value)
        for table in kept.tables.values():
            table.values[row] = math.nan
        for table, columns, values in found.values():
            table.values[row, columns] = values
        kept.count = row + 1

    def refused(self) -> int:
        """Series of the last scrapes that there was no room for."""
        return sum(target.refused for target in self._targets.values())

    def knows(self, name: str) -> bool:
        """Whether any target has this metric."""
        return any(name in target.tables for target in self._targets.values())

    def last(self, name: str, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """The newest values, summed by the labels `by`; what was not in the target's last scrape is left out."""
        out: dict[Labels, float] = {}
        for target, table, columns in self._matching(name, where):
            values = table.values[target.count - 1, columns]
            there = ~np.isnan(values)
            _sum_into(out, table, by, columns[there], values[there])
        return out

    def increase(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """By how much counters grew within the last `seconds`; a restarted process counts from 0."""
        out: dict[Labels, float] = {}
        for _, table, columns, grown in self._grown(name, where, self._clock() - seconds):
            _sum_into(out, table, by, columns, grown.sum(axis=0))
        return out

    def rate(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """As `increase`, a second; over the time that was really watched where that is less."""
        watched = self.watched(seconds)
        return {key: grown / watched for key, grown in self.increase(name, seconds, by, **where).items()}

    def watched(self, seconds: float) -> float:
        """How much of the last `seconds` is known."""
        first = min((target.times[0] for target in self._targets.values() if target.count), default=self._clock())
        return min(seconds, max(1.0, float(self._clock() - first)))

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
        for times, _, _, grown in self._grown(name, where, edges[0]):
            total += _binned(times, grown.sum(axis=1, keepdims=True), edges)[:, 0]
            seen |= np.diff(np.searchsorted(times, edges, "right")) > 0
        return Curve(edges[1:].tolist(), np.where(seen, total / step, math.nan).tolist())

    def quantiles(self, qs: Sequence[float], name: str, seconds: float, step: float, **where: str) -> list[Curve]:
        """Quantiles of a histogram step by step, a curve for each of `qs`; NaN where nothing was observed."""
        edges = self._edges(seconds, step)
        buckets: dict[float, Floats] = {}
        for times, table, columns, grown in self._grown(f"{name}_bucket", where, edges[0]):
            bounds, places = table.groups(("le",))
            binned = _binned(times, grown, edges)
            for place, (le,) in enumerate(bounds):
                counts = binned[:, places[columns] == place].sum(axis=1)
                buckets[float(le)] = buckets[float(le)] + counts if float(le) in buckets else counts
        steps = [{bound: counts[i] for bound, counts in buckets.items()} for i in range(len(edges) - 1)]
        return [Curve(edges[1:].tolist(), [_quantile(q, counts) for counts in steps]) for q in qs]

    def gauge(self, name: str, seconds: float, step: float, **where: str) -> Curve:
        """The sum of all matching gauges, the mean of each step."""
        edges = self._edges(seconds, step)
        total = np.zeros(len(edges) - 1)
        seen = np.zeros(len(edges) - 1, bool)
        for target, table, columns in self._matching(name, where):
            times = target.times[: target.count]
            values = table.values[: target.count, columns]
            known = ~np.isnan(values)
            counts = _binned(times, known.astype(np.float64), edges)
            total += (_binned(times, np.where(known, values, 0.0), edges) / np.maximum(counts, 1)).sum(axis=1)
            seen |= (counts > 0).any(axis=1)
        return Curve(edges[1:].tolist(), np.where(seen, total, math.nan).tolist())

    def _edges(self, seconds: float, step: float) -> Floats:
        # On whole steps, so that a curve moves and does not shimmer.
        end = math.floor(self._clock() / step) * step
        return end - step * np.arange(round(seconds / step), -1, -1, dtype=np.float64)

    def _matching(self, name: str, where: Mapping[str, str]) -> Iterator[tuple[_Target, _Table, Places]]:
        """Target by target: its table of this metric, and the columns with the labels `where`."""
        for target in self._targets.values():
            table = target.tables.get(name)
            if table is not None and target.count and len(columns := table.select(where)):
                yield target, table, columns

    def _grown(
        self, name: str, where: Mapping[str, str], since: float
    ) -> Iterator[tuple[Floats, _Table, Places, Floats]]:
        """As `_matching`: the scrapes after `since`, and what each column grew by at each of them."""
        for target, table, columns in self._matching(name, where):
            times = target.times[: target.count]
            first = int(np.searchsorted(times, since, "right"))
            if first == len(times):
                continue
            # The scrape before them too, for the first to be compared with; before the first of all, nothing grew.
            block = table.values[max(0, first - 1) : len(times), columns]
            if not first:
                block = np.vstack((block[:1], block))
            grown = np.diff(block, axis=0)
            grown = np.where(grown < 0, block[1:], grown)
            gaps = np.flatnonzero(np.isnan(grown).any(axis=0))
            if len(gaps):
                grown[:, gaps] = _bridged(times, table, columns[gaps])[first:]
            yield times[first:], table, columns, grown


def _sum_into(out: dict[Labels, float], table: _Table, by: Sequence[str], columns: Places, values: Floats) -> None:
    keys, places = table.groups(by)
    of = places[columns]
    sums = np.bincount(of, values, len(keys)).tolist()
    for place in np.unique(of).tolist():
        out[keys[place]] = out.get(keys[place], 0.0) + sums[place]


def _bridged(times: Floats, table: _Table, columns: Places) -> Floats:
    """What series with gaps grew by at each scrape; one that came after the first scrape began at 0."""
    values = table.values[: len(times), columns]
    known = ~np.isnan(values)
    # By row, the last one before it that is known; -1: none.
    at = np.where(known, np.arange(len(times))[:, None], -1)
    before = np.vstack((np.full((1, len(columns)), -1), np.maximum.accumulate(at, axis=0)[:-1]))
    previous = np.where(before >= 0, np.take_along_axis(values, np.maximum(before, 0), axis=0), 0.0)
    grown = np.where(values < previous, values, values - previous)
    # What was there before the first scrape that is kept is not of now.
    began = times[:, None] == np.array(table.born)[columns]
    return np.where(known & ((before >= 0) | began), grown, 0.0)


def _binned(times: Floats, grown: Floats, edges: Floats) -> Floats:
    """Sums of `grown` between the edges, column by column."""
    sums = np.vstack((np.zeros((1, grown.shape[1])), np.cumsum(grown, axis=0)))
    places = np.searchsorted(times, edges, "right")
    binned: Floats = sums[places[1:]] - sums[places[:-1]]
    return binned


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
