"""The load of one worker: this router's requests are counted exactly, those of other routers as last reported."""

from __future__ import annotations  # compiled by mypyc

from ringmesh.inference.v1 import inference_pb2


class LoadSum:
    """The total of requests outstanding at several workers."""

    def __init__(self, load: int) -> None:
        self.load = load


class WorkerLoad:
    """The requests outstanding at one worker. Changes are also added to `sums`."""

    def __init__(self) -> None:
        # Requests of this router that are not answered yet.
        self.in_flight = 0
        self.outstanding = 0
        # Mean time between the worker's answers while it has work.
        self.interval_us = 0.0
        self.sums: tuple[LoadSum, ...] = ()
        # The number of reports received, and the description version in the last one.
        self.reports = 0
        self.version = 0
        self._others = 0

    @property
    def wait_us(self) -> float:
        return self.interval_us * self.outstanding

    def sent(self) -> None:
        self.in_flight += 1
        self._add(1)

    def ended(self) -> None:
        """Counts a request as answered or given up."""
        self.in_flight -= 1
        self._add(-1)

    def reported(self, report: inference_pb2.LoadReport, own: int) -> None:
        """Applies a load report of the worker; `own` of its requests are this router's."""
        others = max(0, report.requests - own)
        self._add(others - self._others)
        self._others = others
        if report.requests:
            self.interval_us = report.estimated_wait_us / report.requests
        self.reports += 1
        self.version = report.version

    def _add(self, requests: int) -> None:
        self.outstanding += requests
        for load_sum in self.sums:
            load_sum.load += requests
