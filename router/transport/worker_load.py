"""What one worker has to do, as this router knows: its own requests exactly, those of others as last reported."""

from __future__ import annotations  # compiled by mypyc

from ringmesh.inference.v1 import inference_pb2


class LoadSum:
    """Requests outstanding at several workers together."""

    __slots__ = ("load",)

    def __init__(self, load: int) -> None:
        self.load = load


class WorkerLoad:
    """Requests outstanding at one worker; counted in the sums that it is part of as well."""

    __slots__ = ("_others", "in_flight", "interval_us", "outstanding", "reports", "sums", "version")

    def __init__(self) -> None:
        # Sent from here and not answered.
        self.in_flight = 0
        self.outstanding = 0
        # Mean time between its answers while it has work.
        self.interval_us = 0.0
        self.sums: tuple[LoadSum, ...] = ()
        # How many reports came, and the last one's version of what it holds.
        self.reports = 0
        self.version = 0
        self._others = 0

    @property
    def wait_us(self) -> float:
        """What a request sent now would wait."""
        return self.interval_us * self.outstanding

    def sent(self) -> None:
        """A request is on its way."""
        self.in_flight += 1
        self._add(1)

    def ended(self) -> None:
        """It was answered, or given up."""
        self.in_flight -= 1
        self._add(-1)

    def reported(self, report: inference_pb2.LoadReport, own: int) -> None:
        """The worker's own count, of which `own` were from here."""
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
