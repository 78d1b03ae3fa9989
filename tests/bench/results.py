"""What a run of the bench found: medians and spread by workload, outstanding calls and peer."""

import statistics
from dataclasses import dataclass, field

from tests.bench.harness import Measured
from tests.bench.workloads import Workload

RINGMESH = "Ringmesh"
TRITON = "Triton"
LOW_LEVEL = "echo, low-level"
IN_PROCESS = "ONNX Runtime, row by row"
BATCHES = "ONNX Runtime, batches"


@dataclass(frozen=True)
class Row:
    """One peer under one load. `executions` are rows run for each distinct request, where it was counted."""

    workload: Workload
    outstanding: int
    peer: str
    runs: list[Measured] = field(default_factory=list)
    executions: list[float] = field(default_factory=list)

    def median(self, what: str) -> float:
        """Of a field of Measured, over the runs."""
        return statistics.median(getattr(run, what) for run in self.runs)


class Results:
    """Rows in the order they were first measured."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, str], Row] = {}

    def __iter__(self):
        return iter(self._rows.values())

    def row(self, workload: Workload, outstanding: int, peer: str) -> Row:
        """Made if need be."""
        return self._rows.setdefault((workload.name, outstanding, peer), Row(workload, outstanding, peer))

    def find(self, workload: str, outstanding: int, peer: str) -> Row | None:
        """None where it was not measured."""
        return self._rows.get((workload, outstanding, peer))

    def ratio(self, what: str, workload: str, outstanding: int, peer: str) -> float | None:
        """Ringmesh's median by the peer's."""
        ours, theirs = (self.find(workload, outstanding, name) for name in (RINGMESH, peer))
        return ours.median(what) / theirs.median(what) if ours and theirs else None


@dataclass(frozen=True)
class Figure:
    """A ratio, or what the name says, to reach: at least `bound`, or at most where `at_most`."""

    name: str
    ratio: float
    bound: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound


def figures(results: Results) -> list[Figure]:
    """Those of the performance goals that this run can tell."""
    wanted = [
        *((f"hit, {n} outstanding: requests/s by Triton's", "rps", "hit", n, TRITON, 1.5, False) for n in (16, 64)),
        *(
            (f"hit, {n} outstanding: requests/s by the echo's", "rps", "hit", n, LOW_LEVEL, 0.8, False)
            for n in (16, 64)
        ),
        ("hit, one caller: median latency by Triton's", "p50", "hit", 1, TRITON, 1.0, True),
        ("hit, 16 outstanding: server CPU by Triton's", "cpu_us", "hit", 16, TRITON, 0.7, True),
        *((f"miss, {n} outstanding: requests/s by Triton's", "rps", "miss", n, TRITON, 1.0, False) for n in (16, 64)),
        ("miss, one caller: median latency by Triton's", "p50", "miss", 1, TRITON, 1.3, True),
        ("magika, 16 outstanding: requests/s by ONNX Runtime's", "rps", "miss-magika", 16, IN_PROCESS, 0.97, False),
        ("zipf, 16 outstanding: requests/s by Triton's", "rps", "zipf", 16, TRITON, 1.0, False),
    ]
    found = []
    for name, what, workload, outstanding, peer, bound, at_most in wanted:
        ratio = results.ratio(what, workload, outstanding, peer)
        if ratio is not None:
            found.append(Figure(name, ratio, bound, at_most))
    for outstanding in (16, 64):
        ours, echo = (results.find("hit", outstanding, peer) for peer in (RINGMESH, LOW_LEVEL))
        if ours and echo:
            added = ours.median("cpu_us") - echo.median("cpu_us")
            found.append(Figure(f"hit, {outstanding} outstanding: CPU added to the engine's echo, µs", added, 40, True))
    if (zipf := results.find("zipf", 16, RINGMESH)) and zipf.executions:
        # The audit computes one hit in a thousand again.
        found.append(Figure("zipf: executions for each distinct key", max(zipf.executions), 1.01, True))
    return found
