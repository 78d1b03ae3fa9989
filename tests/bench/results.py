"""Results of a benchmark run by workload, outstanding calls and peer; ratios of two peers, and their verdicts."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.bench.harness import Measured
from tests.bench.workloads import Workload

UP = "ringmesh up"
BARE = "router + worker"
TRITON = "Triton"
ECHO = "echo"
IN_PROCESS = "ONNX Runtime, row by row"
BATCHES = "ONNX Runtime, batches"

THIS, OTHER = "this tree", "the other tree"
# Confidence of the interval around a median ratio: all six of a comparison are then right 94 times of 100.
CONFIDENCE = 0.99
# Fewer rounds cannot give an interval of that confidence, because all of them may lie on one side of the median.
LEAST_ROUNDS = 8
# A smaller difference is not reported, even if it is certain.
LEAST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Spread:
    """A median, and the bounds of an interval around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Returns the spread from the lowest to the highest value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def bootstrap(cls, values: Sequence[float]) -> "Spread":
        """Returns the interval of the median, by 10,000 samples with replacement (Efron 1979, percentile method)."""
        drawn = np.random.default_rng(1).choice(values, (10_000, len(values)))
        low, high = np.quantile(np.median(drawn, axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return cls(statistics.median(values), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One peer under one load. `executions` are rows run for each distinct request, if they were counted."""

    workload: Workload
    outstanding: int
    peer: str
    runs: list[Measured] = field(default_factory=list)
    executions: list[float] = field(default_factory=list)

    def median(self, what: str) -> float:
        """Returns the median over the runs of a field of Measured."""
        return statistics.median(getattr(run, what) for run in self.runs)


class Results:
    """Rows in the order they were first measured."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, str], Row] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def row(self, workload: Workload, outstanding: int, peer: str) -> Row:
        """Returns the row, and creates it if needed."""
        return self._rows.setdefault((workload.name, outstanding, peer), Row(workload, outstanding, peer))

    def find(self, workload: str, outstanding: int, peer: str) -> Row | None:
        """Returns the row, or None if it was not measured."""
        return self._rows.get((workload, outstanding, peer))

    def ratios(self, what: str, workload: str, outstanding: int, peer: str, to: str) -> list[float]:
        """Returns `peer` / `to` for each round, so that other load affects both; empty if one of them is missing."""
        ours, theirs = (self.find(workload, outstanding, name) for name in (peer, to))
        if ours is None or theirs is None:
            return []
        return [getattr(a, what) / getattr(b, what) for a, b in zip(ours.runs, theirs.runs, strict=True)]


@dataclass(frozen=True)
class Figure:
    """A ratio, or another figure by its name. It must reach `required` and should reach `goal`.

    The bounds are lower bounds, or upper bounds if `at_most`.
    """

    name: str
    ratio: Spread
    required: float
    goal: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """The verdict by the median."""

        def reached(bound: float) -> bool:
            return self.ratio.median <= bound if self.at_most else self.ratio.median >= bound

        if self.goal is not None and reached(self.goal):
            return "goal reached"
        return "reached" if reached(self.required) else "missed"


# Workload, outstanding calls, field of Measured, peer to compare with, required, goal, at most.
_TARGETS = (
    ("hit", 16, "rps", TRITON, 1.8, 2.5, False),
    ("hit", 64, "rps", TRITON, 1.8, 2.5, False),
    ("hit", 1, "p50", TRITON, 1.0, None, True),
    ("miss", 1, "rps", TRITON, 1.0, 1.5, False),
    ("miss", 16, "rps", TRITON, 1.0, 1.5, False),
    ("miss", 64, "rps", TRITON, 1.25, 1.5, False),
    ("hit", 64, "p99", TRITON, 1.0, None, True),
    ("miss", 64, "p99", TRITON, 1.0, None, True),
    ("miss-magika", 16, "rps", IN_PROCESS, 0.93, 0.97, False),
    ("zipf", 16, "rps", TRITON, 1.1, None, False),
)
_WORDS = {"rps": "requests/s", "p50": "median latency", "p99": "p99 latency"}


def figures(results: Results) -> list[Figure]:
    """Returns the targets of `ringmesh up` that this run measured: the named ones, and all other rows with Triton."""
    others = ((row.workload.name, row.outstanding, "rps", TRITON, 1.0, 1.5, False) for row in results if row.peer == UP)
    named = {(workload, outstanding) for workload, outstanding, *_ in _TARGETS}
    found = []
    for workload, outstanding, what, peer, required, goal, at_most in (
        *_TARGETS,
        *(other for other in others if other[:2] not in named),
    ):
        if ratios := results.ratios(what, workload, outstanding, UP, peer):
            name = f"{workload}, {outstanding:,} outstanding: {_WORDS[what]} by {peer}'s"
            found.append(Figure(name, Spread.of(ratios), required, goal, at_most))
    if (zipf := results.find("zipf", 16, UP)) and zipf.executions:
        # The audit recomputes one hit in a thousand.
        found.append(Figure("zipf: executions for each distinct key", Spread.of(zipf.executions), 1.01, at_most=True))
    return found


@dataclass(frozen=True)
class Difference:
    """Requests/s of this tree divided by those of the other, and the same for CPU a request, under one load."""

    workload: str
    outstanding: int
    rounds: int
    rps: Spread
    cpu: Spread

    @property
    def verdict(self) -> str:
        """Better or worse if the interval excludes 1 and the difference is large enough; otherwise the same."""
        if self.rounds < LEAST_ROUNDS:
            return "too few rounds"
        if self.rps.low > 1 and self.rps.median >= 1 + LEAST_DIFFERENCE:
            return "better"
        if self.rps.high < 1 and self.rps.median <= 1 - LEAST_DIFFERENCE:
            return "worse"
        return "same"


def differences(results: Results) -> list[Difference]:
    """Returns the difference between the two trees for each load that was measured on both."""
    found = []
    for row in results:
        if row.peer == THIS:
            rps, cpu = (
                results.ratios(what, row.workload.name, row.outstanding, THIS, OTHER) for what in ("rps", "cpu_us")
            )
            spreads = Spread.bootstrap(rps), Spread.bootstrap(cpu)
            found.append(Difference(row.workload.name, row.outstanding, len(rps), *spreads))
    return found
