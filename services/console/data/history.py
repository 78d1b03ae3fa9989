"""A bounded history of metrics in memory, with the queries that the pages need.

Each metric of a process has a table with one row per scrape and one column per series. A query therefore takes a few
array operations, regardless of the number of series. All queries group series by the labels `by`, of which `target` is
the process, and select them by the labels `where`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Labels: TypeAlias = tuple[str, ...]
Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

# The last scrape of each step is kept up to an age, both in seconds: all scrapes of two minutes, one in ten seconds for
# half an hour, one a minute for two hours, and one in ten minutes for a day. That makes about 450.
_KEPT = ((130.0, 0.001), (1810.0, 10.0), (7260.0, 60.0), (87_000.0, 600.0))
KEPT_SECONDS = _KEPT[-1][0]
MAX_SCRAPES = 640
# Maximum number of series of one process, and of all.
MAX_SERIES = 12_000
MAX_ALL_SERIES = 60_000


class ScrapedSample(NamedTuple):
    """The value of one series at one scrape. Each bucket of a histogram is a series with the label `le`."""

    name: str
    labels: frozenset[tuple[str, str]]
    value: float


class _MetricTable:
    """One metric of one process, with one column per series; NaN if a scrape did not have the series."""

    def __init__(self, target: str) -> None:
        self.labels: list[Mapping[str, str]] = []
        self.columns: dict[frozenset[tuple[str, str]], int] = {}
        # Time of each series' first sample; NaN if it is in the first scrape. A series that appears later started at 0.
        self.first_seen: list[float] = []
        # Rows take physical memory only once a scrape fills them.
        self.values: Floats = np.empty((MAX_SCRAPES, 4))
        self._target = target
        self._selected: dict[tuple[tuple[str, str], ...], Indices] = {}
        self._groups: dict[Labels, tuple[list[Labels], Indices]] = {}

    def add(self, labels: frozenset[tuple[str, str]], row: int, now: float) -> int:
        """Adds a series that first appears in this row. Returns its column."""
        column = self.columns[labels] = len(self.labels)
        self.labels.append({**dict(labels), "target": self._target})
        self.first_seen.append(now if row else math.nan)
        if column == self.values.shape[1]:
            wider = np.empty((MAX_SCRAPES, column * 3 // 2))
            wider[:row, :column] = self.values[:row]
            self.values = wider
        self.values[:row, column] = math.nan
        self._forget()
        return column

    def thin(self, kept: Indices) -> int:
        """Keeps only these scrapes and the series in them. Returns the number of removed series."""
        before = len(self.labels)
        rows = self.values[kept]
        columns = np.flatnonzero(~np.isnan(rows[:, :before]).all(axis=0))
        self.values = np.empty((MAX_SCRAPES, max(4, len(columns))))
        self.values[: len(kept), : len(columns)] = rows[:, columns]
        if len(columns) < before:
            moved = {old: new for new, old in enumerate(columns.tolist())}
            self.labels = [self.labels[old] for old in moved]
            self.first_seen = [self.first_seen[old] for old in moved]
            self.columns = {key: moved[old] for key, old in self.columns.items() if old in moved}
            self._forget()
        return before - len(columns)

    def select(self, where: Mapping[str, str]) -> Indices:
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

    def groups(self, by: Sequence[str]) -> tuple[list[Labels], Indices]:
        """Groups columns by the labels `by`. Returns the groups' label values, and the group index of each column."""
        by = tuple(by)
        found = self._groups.get(by)
        if found is None:
            keys: dict[Labels, int] = {}
            indices = [
                keys.setdefault(tuple([labels.get(label, "") for label in by]), len(keys)) for labels in self.labels
            ]
            found = self._groups[by] = (list(keys), np.array(indices, np.intp))
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
        self.tables: dict[str, _MetricTable] = {}

    def thin(self, now: float) -> None:
        times = self.times[: self.count]
        is_kept = np.zeros(self.count, bool)
        for age, step in _KEPT:
            is_last_of_step = np.append(np.diff(np.ceil(times / step)) != 0, True)
            is_kept |= is_last_of_step & (times > now - age)
        # More are kept only if a process was scraped too often.
        kept = np.flatnonzero(is_kept)[-MAX_SCRAPES * 3 // 4 :]
        self.series -= sum(table.thin(kept) for table in self.tables.values())
        self.tables = {name: table for name, table in self.tables.items() if table.labels}
        self.times[: len(kept)] = times[kept]
        self.count = len(kept)


class Values(dict[Labels, float]):
    """Values by the labels of their group; NaN for groups without a value."""

    def __missing__(self, _: Labels) -> float:
        return math.nan


class History:
    """The recent scrapes of every target. `clock` returns seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._targets: dict[str, _Target] = {}

    def add(self, target: str, samples: Sequence[ScrapedSample]) -> None:
        """Adds a scrape. Drops series beyond MAX_SERIES per target or MAX_ALL_SERIES; `refused` counts them."""
        kept = self._targets.setdefault(target, _Target())
        now = self._clock()
        if kept.count == MAX_SCRAPES:
            kept.thin(now)
        row = kept.count
        kept.times[row] = now
        kept.refused = 0
        room = min(MAX_SERIES - kept.series, MAX_ALL_SERIES - sum(each.series for each in self._targets.values()))
        found: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for name, labels, value in samples:
            table = kept.tables.get(name)
            if table is None:
                table = kept.tables[name] = _MetricTable(target)
            column = table.columns.get(labels)
            if column is None:
                if not room:
                    kept.refused += 1
                    continue
                room -= 1
                kept.series += 1
                column = table.add(labels, row, now)
            columns, values = found[name]
            columns.append(column)
            values.append(value)
        for table in kept.tables.values():
            table.values[row] = math.nan
        for name, (columns, values) in found.items():
            kept.tables[name].values[row, columns] = values
        kept.count = row + 1

    def refused(self) -> int:
        return sum(target.refused for target in self._targets.values())

    def knows(self, name: str) -> bool:
        return any(name in target.tables for target in self._targets.values())

    def watched(self, seconds: float) -> float:
        """Returns how many of the last `seconds` were observed."""
        first = min((target.times[0] for target in self._targets.values() if target.count), default=self._clock())
        return min(seconds, max(1.0, float(self._clock() - first)))

    def edges(self, seconds: float, step: float) -> Floats:
        """Returns the times between the steps of a chart over the last `seconds`, in seconds since the epoch."""
        # Align to whole steps, so that a curve shifts over time but does not change shape.
        end = math.floor(self._clock() / step) * step
        return end - step * np.arange(round(seconds / step), -1, -1, dtype=np.float64)

    def last(self, name: str, by: Sequence[str] = (), **where: str) -> Values:
        """Returns the newest values, summed by group. Omits series missing from the target's last scrape."""
        out = Values()
        for target, table, columns in self._matching(name, where):
            values = table.values[target.count - 1, columns]
            present = ~np.isnan(values)
            keys, sums = _grouped(table, by, columns[present], values[None, present])
            for key, total in zip(keys, sums[0].tolist(), strict=True):
                out[key] = out.get(key, 0.0) + total
        return out

    def increase(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> Values:
        """Returns the growth of counters within the last `seconds`; the counters of a restarted process start at 0."""
        grown = self._grown(name, self._last_seconds(seconds), by, where)
        return Values({key: float(value[0]) for key, value in grown.items()})

    def rate(self, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> Values:
        """Returns `increase` per second, over `seconds` or the observed time if that is shorter."""
        watched = self.watched(seconds)
        return Values({key: grown / watched for key, grown in self.increase(name, seconds, by, **where).items()})

    def rates(self, name: str, edges: Floats, by: Sequence[str] = (), **where: str) -> dict[Labels, Floats]:
        """Returns the rate of counters per second in each step; NaN if no process was scraped in it."""
        return {key: grown / np.diff(edges) for key, grown in self._grown(name, edges, by, where).items()}

    def quantile(self, q: float, name: str, seconds: float, by: Sequence[str] = (), **where: str) -> Values:
        """Returns a quantile of a histogram over the last `seconds`. Omits groups without observations."""
        found = self.quantiles((q,), name, self._last_seconds(seconds), by, **where)
        return Values({key: float(value) for key, ((value,),) in found.items() if not math.isnan(value)})

    def quantiles(
        self, qs: Sequence[float], name: str, edges: Floats, by: Sequence[str] = (), **where: str
    ) -> dict[Labels, list[Floats]]:
        """Returns quantiles of a histogram in each step, one array for each of `qs`; NaN if nothing was observed."""
        buckets: dict[Labels, dict[float, Floats]] = {}
        for (*key, bound), counts in self._grown(f"{name}_bucket", edges, (*by, "le"), where).items():
            buckets.setdefault(tuple(key), {})[float(bound)] = counts
        return {key: [_quantile(q, counts) for q in qs] for key, counts in buckets.items()}

    def gauges(self, name: str, edges: Floats, by: Sequence[str] = (), **where: str) -> dict[Labels, Floats]:
        """Returns the mean of gauges in each step, summed by group; NaN if no process was scraped in it."""
        out: dict[Labels, Floats] = {}
        for target, table, columns in self._matching(name, where):
            times = target.times[: target.count]
            values = table.values[: target.count, columns]
            known = ~np.isnan(values)
            counts = _binned(times, known.astype(np.float64), edges)
            means = _binned(times, np.where(known, values, 0.0), edges) / np.maximum(counts, 1)
            means[~counts.any(axis=1)] = math.nan
            _add_all(out, *_grouped(table, by, columns, means))
        return out

    def _last_seconds(self, seconds: float) -> Floats:
        now = self._clock()
        return np.array((now - seconds, now))

    def _matching(self, name: str, where: Mapping[str, str]) -> Iterator[tuple[_Target, _MetricTable, Indices]]:
        """Yields each target, its table of this metric, and the columns with the labels `where`."""
        for target in self._targets.values():
            table = target.tables.get(name)
            if table is not None and target.count and len(columns := table.select(where)):
                yield target, table, columns

    def _grown(self, name: str, edges: Floats, by: Sequence[str], where: Mapping[str, str]) -> dict[Labels, Floats]:
        """Returns the growth of counters between the edges by group; NaN between edges without a scrape."""
        out: dict[Labels, Floats] = {}
        for target, table, columns in self._matching(name, where):
            times = target.times[: target.count]
            first = int(np.searchsorted(times, edges[0], "right"))
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
            scraped = np.diff(np.searchsorted(times, edges, "right")) > 0
            keys, sums = _grouped(table, by, columns, grown)
            binned = _binned(times[first:], sums, edges)
            binned[~scraped] = math.nan
            _add_all(out, keys, binned)
        return out


def _grouped(table: _MetricTable, by: Sequence[str], columns: Indices, values: Floats) -> tuple[list[Labels], Floats]:
    """Returns the groups of the columns, and the sums of each row of `values` by group."""
    keys, indices = table.groups(by)
    present, group = np.unique(indices[columns], return_inverse=True)
    sums = np.array([np.bincount(group, row, len(present)) for row in values])
    return [keys[index] for index in present.tolist()], sums


def _add_all(out: dict[Labels, Floats], keys: Sequence[Labels], curves: Floats) -> None:
    for key, curve in zip(keys, curves.T, strict=True):
        out[key] = add(out[key], curve) if key in out else curve


def add(one: Any, other: Any) -> Any:
    """Adds two values or two curves. NaN counts as 0 unless both are NaN."""
    return np.where(np.isnan(one), other, one + np.nan_to_num(other))[()]


def _bridged(times: Floats, table: _MetricTable, columns: Indices) -> Floats:
    """Returns the growth of series with gaps at each scrape. A series that first appears later starts at 0."""
    values = table.values[: len(times), columns]
    known = ~np.isnan(values)
    # For each row, the last earlier row with a known value; -1: none.
    at = np.where(known, np.arange(len(times))[:, None], -1)
    before = np.vstack((np.full((1, len(columns)), -1), np.maximum.accumulate(at, axis=0)[:-1]))
    previous = np.where(before >= 0, np.take_along_axis(values, np.maximum(before, 0), axis=0), 0.0)
    grown = np.where(values < previous, values, values - previous)
    # Growth from before the first kept scrape does not count.
    appeared = times[:, None] == np.array(table.first_seen)[columns]
    return np.where(known & ((before >= 0) | appeared), grown, 0.0)


def _binned(times: Floats, values: Floats, edges: Floats) -> Floats:
    """Returns the sums of `values` between the edges, by column."""
    sums = np.vstack((np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)))
    binned: Floats = np.diff(sums[np.searchsorted(times, edges, "right")], axis=0)
    return binned


def _quantile(q: float, buckets: Mapping[float, Floats]) -> Floats:
    """Computes Prometheus's histogram_quantile: linear in a bucket, at most the last finite bound, NaN if empty."""
    bounds = sorted(buckets)
    cumulative = np.nan_to_num([buckets[bound] for bound in bounds])
    rank = q * cumulative[-1]
    at = (cumulative >= rank).argmax(axis=0)
    uppers = np.array(bounds)
    lower = np.array([0.0, *bounds[:-1]])[at]
    below = np.take_along_axis(np.vstack((np.zeros_like(rank), cumulative)), at[None], axis=0)[0]
    inside = np.take_along_axis(cumulative, at[None], axis=0)[0] - below
    share = np.divide(rank - below, inside, out=np.ones_like(rank), where=inside > 0)
    upper = np.where(np.isinf(uppers[at]), lower, uppers[at])
    found: Floats = np.where(cumulative[-1] > 0, lower + (upper - lower) * share, math.nan)
    return found
