"""Outlier detection: ejects workers that answer badly, for longer each time, and never too many at once.

After Envoy's outlier detection: consecutive transport failures, and latencies far above those of other workers.
"""

from __future__ import annotations  # compiled by mypyc

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from services.runtime.telemetry.recent import Recent

CONSECUTIVE_FAILURES = 3
# Duration of the first ejection in seconds; doubled for each further one.
FIRST_EJECTION = 2.0
LONGEST_EJECTION = 60.0
# Latencies are compared every WINDOW_SECONDS, for workers with at least LEAST_ANSWERS answers. A worker is an outlier
# if in two windows in a row its latency is FACTOR times that of the others and exceeds it by LEAST_EXCESS seconds.
WINDOW_SECONDS = 1.0
LEAST_ANSWERS = 10
FACTOR = 4.0
LEAST_EXCESS = 0.05
# At most this share of the fleet is ejected at once; of two workers one may be.
LARGEST_SHARE = 1 / 3
# Weight of one answer in the moving average of a model's latency.
_SMOOTHING = 0.02
_MAX_MODELS = 4096


@dataclass(slots=True)
class _WorkerRecord:
    failures: int = 0
    # In this window: the number of answers, the seconds they took, and the seconds usual for their models.
    answers: int = 0
    taken: float = 0.0
    usual: float = 0.0
    slow_windows: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    reason: str = ""


class Outliers:
    """Judges workers by their answers. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: defaultdict[str, _WorkerRecord] = defaultdict(_WorkerRecord)
        # Moving average of a model's latency over the whole fleet, in seconds, by digest.
        self.usual = Recent[bytes, float](_MAX_MODELS)
        self._window_ends = clock() + WINDOW_SECONDS

    def answered(self, worker: str, model: bytes, seconds: float) -> None:
        """Records the duration of an attempt. It was answered, or given up because another was faster."""
        record = self._records[worker]
        record.failures = 0
        usual = self.usual.get(model)
        if usual is None:
            usual = seconds
        self.usual.put(model, usual + (seconds - usual) * _SMOOTHING)
        record.answers += 1
        record.taken += seconds
        record.usual += usual

    def failed(self, worker: str) -> None:
        self._records[worker].failures += 1

    def forget(self, worker: str) -> None:
        self._records.pop(worker, None)

    def ejected(self, fleet: Mapping[str, bool]) -> dict[str, str]:
        """The workers that are ejected now, and why. `fleet`: whether each is healthy; only healthy ones are judged."""
        now = self._clock()
        judged = [worker for worker, can_be_asked in fleet.items() if can_be_asked]
        slow = self._slow(judged) if now >= self._window_ends else {}
        allowed = max(1, int(len(judged) * LARGEST_SHARE)) if len(judged) > 1 else 0
        out = {worker for worker in fleet if self._records[worker].ejected_until > now}
        allowed += sum(not fleet[worker] for worker in out)
        for worker in judged:
            record = self._records[worker]
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
        return {worker: self._records[worker].reason for worker in out}

    def _slow(self, fleet: Collection[str]) -> dict[str, str]:
        """Closes the window. Returns the slow workers, each with a reason."""
        self._window_ends = self._clock() + WINDOW_SECONDS
        judged = {worker: record for worker in fleet if (record := self._records[worker]).answers >= LEAST_ANSWERS}
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
                # One good window reverts one step of the back-off.
                record.ejections = max(0, record.ejections - 1)
        # The others keep their counts, so that a worker with few answers is judged once it has enough.
        for record in judged.values():
            record.answers, record.taken, record.usual = 0, 0.0, 0.0
        return slow
