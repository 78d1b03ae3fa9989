"""This process's load, in the trailing metadata of its answers: ORCA, which gRPC's weighted_round_robin follows."""

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
    """Since the process started."""

    all: int
    # For which the server is to blame.
    failed: int


class LoadReport:
    """`trailer` is the last report, serialized: an answer costs no more than to name it.

    Python runs in one thread at a time, that of the event loop or the one that receives calls. `cores` are for the
    others. So whichever is busier says how busy the process is.
    `named` has metrics by names of our own.
    """

    def __init__(
        self, answers: Callable[[], Answers], cores: int, named: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._answers = answers
        self._cores = cores
        self._named = named
        self._receiver_seconds: Callable[[], float] = float
        self._last = (0.0, 0.0, 0.0, Answers(0, 0))
        self.trailer: tuple[str, bytes] = (_NAME, b"")

    def start(self, receiver_seconds: Callable[[], float]) -> None:
        """To be called on the event loop; ends with it. `receiver_seconds`: CPU time of the receiving thread."""
        self._receiver_seconds = receiver_seconds
        self._last = self._now()
        BACKGROUND.start("load report", self._measure_on)

    def _now(self) -> tuple[float, float, float, Answers]:
        return time.monotonic(), time.process_time(), time.thread_time() + self._receiver_seconds(), self._answers()

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
            # Never 0, which would say that nothing is known.
            application_utilization=max(cpu, (thread - last_thread) / seconds, 1e-3),
            rps_fractional=(answers.all - last.all) / seconds,
            eps=(answers.failed - last.failed) / seconds,
            named_metrics=self._named(),
        )
        self.trailer = (_NAME, report.SerializeToString())
        self._last = (now, process, thread, answers)
