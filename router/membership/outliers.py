"""Who answers, but badly: ejected for a while, longer each time, and never too many at once.

After Envoy's outlier detection: consecutive failures of the transport, and latencies far from those of the others.
"""

from __future__ import annotations  # compiled by mypyc

import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from services.runtime.telemetry.recent import Recent

CONSECUTIVE_FAILURES = 3
# Seconds of the first ejection; doubled for each further one.
FIRST_EJECTION = 2.0
LONGEST_EJECTION = 60.0
# How often latencies are compared, those of so many answers or more, and what makes one an outlier: twice in a row so
# many times the others', by so much.
WINDOW_SECONDS = 1.0
LEAST_ANSWERS = 10
FACTOR = 4.0
LEAST_EXCESS = 0.05
# At most this part of the fleet, yet one of two.
LARGEST_SHARE = 1 / 3
# Weight of an answer in the latency of a model that others are measured by.
_SMOOTHING = 0.02
_MAX_MODELS = 4096


@dataclass(slots=True)
class _Record:
    failures: int = 0
    # In this window: seconds taken, and seconds that the model takes on the whole fleet.
    answers: int = 0
    taken: float = 0.0
    usual: float = 0.0
    slow_windows: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    reason: str = field(default="")


class Outliers:
    """Judges workers by their answers. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}
        # What an answer of a model takes on the whole fleet, in seconds, by digest.
        self.usual = Recent[bytes, float](_MAX_MODELS)
        self._window_ends = clock() + WINDOW_SECONDS

    def answered(self, worker: str, model: bytes, seconds: float) -> None:
        """An attempt came back, or was given up after so long for a faster one."""
        record = self._record(worker)
        record.failures = 0
        usual = self.usual.get(model)
        if usual is None:
            usual = seconds
        self.usual.put(model, usual + (seconds - usual) * _SMOOTHING)
        record.answers += 1
        record.taken += seconds
        record.usual += usual

    def failed(self, worker: str) -> None:
        """The transport failed under an attempt."""
        self._record(worker).failures += 1

    def forget(self, worker: str) -> None:
        """It has left."""
        self._records.pop(worker, None)

    def ejected(self, fleet: Mapping[str, bool]) -> dict[str, str]:
        """Who should not be asked now, and why. `fleet` says of each whether it can be: only those are judged."""
        now = self._clock()
        judged = [worker for worker, can_be_asked in fleet.items() if can_be_asked]
        slow = self._slow(judged) if now >= self._window_ends else {}
        allowed = max(1, int(len(judged) * LARGEST_SHARE)) if len(judged) > 1 else 0
        out = {worker for worker in fleet if self._record(worker).ejected_until > now}
        allowed += sum(not fleet[worker] for worker in out)
        for worker in judged:
            record = self._record(worker)
            if worker in out:
                continue
            if record.reason:
                record.reason = ""
                record.failures = 0
            why = slow.get(worker, "")
            if record.failures >= CONSECUTIVE_FAILURES:
                why = f"{record.failures} attempts in a row failed"
            if why and len(out) < allowed:
                seconds = min(FIRST_EJECTION * 2**record.ejections, LONGEST_EJECTION)
                record.ejections += 1
                record.ejected_until = now + seconds
                record.reason = f"ejected for {seconds:g} s: {why}"
                record.slow_windows = 0
                out.add(worker)
        return {worker: self._record(worker).reason for worker in out}

    def _slow(self, fleet: Collection[str]) -> dict[str, str]:
        """Closes the window."""
        self._window_ends = self._clock() + WINDOW_SECONDS
        judged = {worker: record for worker in fleet if (record := self._record(worker)).answers >= LEAST_ANSWERS}
        ratios = {worker: record.taken / max(record.usual, 1e-9) for worker, record in judged.items()}
        slow = {}
        for worker, record in judged.items():
            others = [ratio for other, ratio in ratios.items() if other != worker]
            if not others:
                continue
            typical = statistics.median(others)
            excess = (record.taken - typical * record.usual) / record.answers
            if ratios[worker] > FACTOR * typical and excess > LEAST_EXCESS:
                record.slow_windows += 1
                if record.slow_windows > 1:
                    slow[worker] = f"{excess * 1000:.0f} ms slower than the others"
            else:
                record.slow_windows = 0
                # One good window takes back one step of the back-off.
                record.ejections = max(0, record.ejections - 1)
        # Who is so slow that it gave few answers is judged when there are enough.
        for record in judged.values():
            record.answers, record.taken, record.usual = 0, 0.0, 0.0
        return slow

    def _record(self, worker: str) -> _Record:
        record = self._records.get(worker)
        if record is None:
            record = self._records[worker] = _Record()
        return record
