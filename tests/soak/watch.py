"""What the processes hold, sampled through the run: memory, open files, tasks, flights."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from tests.system.test_metrics import scrape, value

PERIOD_SECONDS = 2.0
# Until a process has filled its caches, where the run is that long.
SETTLED_SECONDS = 300.0
WINDOW_SECONDS = 300.0
FIGURES = ("memory MB", "open files", "tasks", "flights")


@dataclass(frozen=True)
class Sample:
    pid: int
    at: float
    figures: tuple[float, ...]


def _flights(told: Mapping[str, Any]) -> float:
    return value(told, "ringmesh_requests_in_flight") + value(told, "ringmesh_flights")


class Watch:
    """Samples of each process by name. `pids` and `metrics` tell where they are now. A process that has just started
    grows, while its caches fill: it is looked at once it is `settled_seconds` old."""

    def __init__(
        self, pids: Callable[[], Mapping[str, int]], metrics: Mapping[str, str], settled_seconds: float
    ) -> None:
        self._pids = pids
        self._metrics = metrics
        self._settled_seconds = settled_seconds
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(PERIOD_SECONDS)

    def look(self) -> None:
        """One sample of each process that is old enough and answers."""
        for name, pid in self._pids().items():
            try:
                process = psutil.Process(pid)
                if time.time() - process.create_time() < self._settled_seconds:
                    continue
                told = scrape(self._metrics[name]) if name in self._metrics else {}
                figures = (
                    process.memory_info().rss / 1e6,
                    process.num_fds(),
                    value(told, "ringmesh_event_loop_tasks"),
                    _flights(told),
                )
            except (psutil.Error, OSError):
                continue  # it is stopped, or just ended
            self.samples[name].append(Sample(pid, time.monotonic(), figures))

    def in_flight(self) -> dict[str, float]:
        """Requests under way now, by process; those that have just started count too."""
        return {name: _flights(scrape(address)) for name, address in self._metrics.items()}

    def slopes(self) -> dict[str, list[tuple[float, float]]]:
        """By process: for each of FIGURES its median, and how much the fitted line rises in ten minutes, since its last
        start."""
        found = {}
        for name, samples in self._since_last_start():
            at = np.array([sample.at for sample in samples])
            columns = np.array([sample.figures for sample in samples]).T
            found[name] = [
                (float(np.median(column)), float(np.polyfit(at - at[0], column, 1)[0] * 600)) for column in columns
            ]
        return found

    def memory(self) -> dict[str, list[float]]:
        """By process: medians of its memory in MB, for each five minutes since its last start."""
        found: dict[str, list[float]] = {}
        for name, samples in self._since_last_start():
            windows: dict[int, list[float]] = defaultdict(list)
            for sample in samples:
                windows[int((sample.at - samples[0].at) // WINDOW_SECONDS)].append(sample.figures[0])
            found[name] = [float(np.median(windows[number])) for number in sorted(windows)]
        return found

    def _since_last_start(self) -> Iterator[tuple[str, list[Sample]]]:
        for name, looked in self.samples.items():
            samples = [sample for sample in looked if sample.pid == looked[-1].pid]
            if len(samples) >= 3:
                yield name, samples
