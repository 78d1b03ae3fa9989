"""Service level objectives: the share of requests that may fail or be slow, and how fast that error budget is used up.

Burn rates over several windows, as in the SRE Workbook (chapter 5): at rate 1 a window uses up exactly its own budget.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from router.accounting.request_metrics import RequestMetrics
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

_OBJECTIVE = ("objective",)
TARGET = Family("ringmesh_slo_target_ratio", "gauge", "target share of good requests", _OBJECTIVE)
SECONDS = Family("ringmesh_slo_latency_seconds", "gauge", "latency objective, rounded up to the next bucket's bound")
REQUESTS = Family("ringmesh_slo_requests_total", "counter", "requests that count for an objective", _OBJECTIVE)
BAD = Family(
    "ringmesh_slo_bad_total",
    "counter",
    "bad ones of those; availability: the fleet failed; latency: answered later than RINGMESH_SLO_LATENCY_SECONDS",
    _OBJECTIVE,
)
BURN = Family(
    "ringmesh_slo_burn_rate",
    "gauge",
    "bad share of a window's requests divided by the allowed share; windows 5m, 30m, 1h, 2h, 6h, 1d, 3d",
    ("objective", "window"),
)

_WINDOWS = {"5m": 300, "30m": 1800, "1h": 3600, "2h": 7200, "6h": 21600, "1d": 86400, "3d": 259200}
_PERIOD_SECONDS = 60.0


class _Point(NamedTuple):
    at: float
    values: dict[str, tuple[int, int]]


class Slo:
    """Compares the counts of `requests` with the target shares, 0 to 1: of `availability`, and of `latency`.

    The latter is the share of answers within `seconds`. `clock` as time.monotonic.
    """

    def __init__(
        self, targets: Mapping[str, float], seconds: float, requests: RequestMetrics, clock: Callable[[], float]
    ) -> None:
        self._targets = targets
        self._seconds = seconds
        self._requests = requests
        self._clock = clock
        self._past: deque[_Point] = deque([self._point()], maxlen=int(_WINDOWS["3d"] / _PERIOD_SECONDS) + 1)

    def start(self) -> None:
        """Samples every minute from now on."""
        BACKGROUND.every(_PERIOD_SECONDS, "objectives", self.sample)

    def sample(self) -> None:
        """Stores a sample for the start of later windows."""
        self._past.append(self._point())

    def samples(self) -> Iterator[Sample]:
        now = self._point()
        times = [point.at for point in self._past]
        yield Sample(SECONDS, (), self._seconds)
        for objective, target in self._targets.items():
            total, bad = now.values[objective]
            yield Sample(TARGET, (objective,), target)
            yield Sample(REQUESTS, (objective,), total)
            yield Sample(BAD, (objective,), bad)
            for window, seconds in _WINDOWS.items():
                # If the process is younger than the window, the window begins at its start.
                index = max(0, bisect_left(times, now.at - seconds + 1e-6) - 1)
                total_then, bad_then = self._past[index].values[objective]
                part = (bad - bad_then) / (total - total_then) if total > total_then else 0.0
                yield Sample(BURN, (objective, window), part / (1 - target))

    def _point(self) -> _Point:
        total, failed, answered, slow = self._requests.totals(self._seconds)
        return _Point(self._clock(), {"availability": (total, failed), "latency": (answered, slow)})
