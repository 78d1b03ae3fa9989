"""A bounded history of metrics in memory, with the queries that the pages need.

Each metric of a process has a table with one row per scrape. A query therefore takes a few array operations, regardless
of the number of series.
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

# All scrapes of the last two minutes are kept, and one per ten seconds of the last half hour.
KEPT_SECONDS = 1810.0
MAX_SCRAPES = 384
# Maximum number of series of one process, and of all.
MAX_SERIES = 12_000
MAX_ALL_SERIES = 60_000
_WHOLE_SECONDS = 130.0
_THINNED_SECONDS = 10.0


class Sample(NamedTuple):
    """The value of one series at one scrape. Each bucket of a histogram is a series with the label `le`.

    Adding is fastest if `labels` is the same object at each scrape.
    """

    name: str
    labels: Mapping[str, str]
    value: float


class _Table:
    """One metric of one process, with one column per series; NaN if a scrape did not have the series."""

    def __init__(self, target: str) -> None:
        self.labels: list[Mapping[str, str]] = []
        self.columns: dict[tuple[tuple[str, str], ...], int] = {}
        # Time of each series' first sample if it is not in the first scrape (the series starts at 0 then); else NaN.
        self.born: list[float] = []
        # Rows take physical memory only once a scrape fills them.
        self.values: Floats = np.empty((MAX_SCRAPES, 4))
        self._target = target
        self._selected: dict[tuple[tuple[str, str], ...], Places] = {}
        self._groups: dict[Labels, tuple[list[Labels], Places]] = {}

    def add(self, key: tuple[tuple[str, str], ...], labels: Mapping[str, str], row: int, now: float) -> int:
        """Adds a series that first appears in this row. Returns its column."""
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
        """Keeps only these scrapes and the series in them. Returns the number of removed series."""
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
        """Returns the columns with these labels."""
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
        """Groups columns by the labels `by`. Returns the groups' label values, and the group index of each column."""
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
        # By the id() of a sample's labels. The labels are referenced here, so that the id stays valid.
        self.known: dict[int, tuple[Mapping[str, str], str, _Table, int]] = {}

    def thin(self, now: float) -> None:
        """Removes scrapes to make room for new ones."""
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
    """A value over time; NaN: unknown. `times` are the ends of the steps, in seconds since the epoch."""

    times: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart. The first curve of a chart is drawn solid, the others dashed."""

    label: str
    curve: Curve

    @property
    def now(self) -> float:
        """The last known value; NaN if there is none."""
        return next((value for value in reversed(self.curve.values) if not math.isnan(value)), math.nan)


class History:
    """The recent scrapes of every target. `clock` returns seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._targets: dict[str, _Target] = {}

    def add(self, target: str, samples: Sequence[Sample]) -> None:
        """Adds a scrape. Drops series beyond MAX_SERIES per target or MAX_ALL_SERIES; `refused` counts them."""
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
        """Returns the number of series in the last scrapes that were dropped for lack of room."""
        return sum(target.refused for target in self._targets.values())

    def knows(self, name: str) -> bool:
        """Whether any target has this metric."""
        return any(name in target.tables for target in self._targets.values())

    def last(self, name: str, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """Returns the newest values, summed by the labels `by`. Omits series missing from the target's last scrape."""
        out: dict[Labels, float] = {}
        for target, table, columns in self._matching(name, where):
            values = table.values[target.count - 1, columns]
            there = ~np.isnan(values)
            _sum_into(out, table, by, columns[there], values[there])
        return out

    def increase(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """Returns the growth of counters within the last `seconds`; the counters of a restarted process start at 0."""
        out: dict[Labels, float] = {}
        for _, table, columns, grown in self._grown(name, where, self._clock() - seconds):
            _sum_into(out, table, by, columns, grown.sum(axis=0))
        return out

    def rate(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> dict[Labels, float]:
        """Returns `increase` per second, over `seconds` or the observed time if that is shorter."""
        watched = self.watched(seconds)
        return {key: grown / watched for key, grown in self.increase(name, seconds, by, **where).items()}

    def watched(self, seconds: float) -> float:
        """Returns how many of the last `seconds` were observed."""
        first = min((target.times[0] for target in self._targets.values() if target.count), default=self._clock())
        return min(seconds, max(1.0, float(self._clock() - first)))

    def quantile(
        self, q: float, name: str, seconds: float, by: Sequence[str] = (), **where: str
    ) -> dict[Labels, float]:
        """Returns a quantile of a histogram over the last `seconds`, interpolated in a bucket. Omits empty groups."""
        counts: dict[Labels, dict[float, float]] = {}
        for key, grown in self.increase(f"{name}_bucket", seconds, (*by, "le"), **where).items():
            counts.setdefault(key[:-1], {})[float(key[-1])] = grown
        found = {key: _quantile(q, buckets) for key, buckets in counts.items()}
        return {key: value for key, value in found.items() if not math.isnan(value)}

    def rates(self, name: str, seconds: float, step: float, **where: str) -> Curve:
        """Returns the total rate per second of all matching counters, by step."""
        edges = self._edges(seconds, step)
        total = np.zeros(len(edges) - 1)
        seen = np.zeros(len(edges) - 1, bool)
        for times, _, _, grown in self._grown(name, where, edges[0]):
            total += _binned(times, grown.sum(axis=1, keepdims=True), edges)[:, 0]
            seen |= np.diff(np.searchsorted(times, edges, "right")) > 0
        return Curve(edges[1:].tolist(), np.where(seen, total / step, math.nan).tolist())

    def quantiles(self, qs: Sequence[float], name: str, seconds: float, step: float, **where: str) -> list[Curve]:
        """Returns quantiles of a histogram by step, one curve for each of `qs`; NaN: nothing was observed."""
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
        """Returns the sum of all matching gauges, averaged over each step."""
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
        # Align to whole steps, so that a curve shifts over time but does not change shape.
        end = math.floor(self._clock() / step) * step
        return end - step * np.arange(round(seconds / step), -1, -1, dtype=np.float64)

    def _matching(self, name: str, where: Mapping[str, str]) -> Iterator[tuple[_Target, _Table, Places]]:
        """Yields each target, its table of this metric, and the columns with the labels `where`."""
        for target in self._targets.values():
            table = target.tables.get(name)
            if table is not None and target.count and len(columns := table.select(where)):
                yield target, table, columns

    def _grown(
        self, name: str, where: Mapping[str, str], since: float
    ) -> Iterator[tuple[Floats, _Table, Places, Floats]]:
        """Yields for each matching table the scrapes after `since`, and the growth of each column at each of them."""
        for target, table, columns in self._matching(name, where):
            times = target.times[: target.count]
            first = int(np.searchsorted(times, since, "right"))
            if first == len(times):
                continue
            # Include the scrape before, to compare the first one with. The very first scrape counts as no growth.
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
    """Returns the growth of series with gaps at each scrape. A series that first appears later starts at 0."""
    values = table.values[: len(times), columns]
    known = ~np.isnan(values)
    # For each row, the last earlier row with a known value; -1: none.
    at = np.where(known, np.arange(len(times))[:, None], -1)
    before = np.vstack((np.full((1, len(columns)), -1), np.maximum.accumulate(at, axis=0)[:-1]))
    previous = np.where(before >= 0, np.take_along_axis(values, np.maximum(before, 0), axis=0), 0.0)
    grown = np.where(values < previous, values, values - previous)
    # Growth from before the first kept scrape does not count.
    began = times[:, None] == np.array(table.born)[columns]
    return np.where(known & ((before >= 0) | began), grown, 0.0)


def _binned(times: Floats, grown: Floats, edges: Floats) -> Floats:
    """Returns the sums of `grown` between the edges, by column."""
    sums = np.vstack((np.zeros((1, grown.shape[1])), np.cumsum(grown, axis=0)))
    places = np.searchsorted(times, edges, "right")
    binned: Floats = sums[places[1:]] - sums[places[:-1]]
    return binned


def _quantile(q: float, cumulative: Mapping[float, float]) -> float:
    """Computes Prometheus's histogram_quantile: linear in a bucket, at most the last finite bound, NaN if empty."""
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
