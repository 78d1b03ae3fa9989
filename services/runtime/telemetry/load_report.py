"""Load reports in trailing metadata, in the ORCA format that gRPC's weighted_round_robin policy reads."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ringmesh.orca.v3 import orca_load_report_pb2

from services.runtime.telemetry.supervisor import BACKGROUND

SECONDS = 0.25
_NAME = "endpoint-load-metrics-bin"


class Answers(NamedTuple):
    """Counts of answers since the process started."""

    all: int
    # Answers that failed by the server's fault.
    failed: int


class LoadReport:
    """Measures the load of this process. `trailer` is the last report, serialized, so sending it costs nothing.

    The event loop has one core, and the other threads run on `cores`. The reported utilization is the higher of the
    two.
    `named` returns Ringmesh's own metrics by name.
    """

    def __init__(
        self, answers: Callable[[], Answers], cores: int, named: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._answers = answers
        self._cores = cores
        self._named = named
        self._last = (0.0, 0.0, 0.0, Answers(0, 0))
        self.trailer: tuple[str, bytes] = (_NAME, b"")

    def start(self) -> None:
        """Starts measuring, on and as long as the event loop."""
        self._last = self._now()
        BACKGROUND.start("load report", self._measure_on)

    def _now(self) -> tuple[float, float, float, Answers]:
        return time.monotonic(), time.process_time(), time.thread_time(), self._answers()

    async def _measure_on(self) -> None:
        while True:
            self._measure()
            await asyncio.sleep(SECONDS)

    def _measure(self) -> None:
        now, process, thread, answers = self._now()
        last_now, last_process, last_thread, last = self._last
        seconds = max(now - last_now, 1e-3)
        cpu = (process - last_process) / seconds / self._cores
        report = orca_load_report_pb2.OrcaLoadReport(
            cpu_utilization=cpu,
            # Never 0, which would mean "unknown".
            application_utilization=max(cpu, (thread - last_thread) / seconds, 1e-3),
            rps_fractional=(answers.all - last.all) / seconds,
            eps=(answers.failed - last.failed) / seconds,
            named_metrics=self._named(),
        )
        self.trailer = (_NAME, report.SerializeToString())
        self._last = (now, process, thread, answers)
