"""Slow start: a new worker takes little load at first, because its caches, threads and kernels are cold."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable

SECONDS = 10.0
FIRST = 0.1
# A router that has just started cannot tell new workers from old ones, so it ramps none in this time.
_ACQUAINTANCE_SECONDS = 5.0


class SlowStart:
    """The ramp of each worker. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._everybody_is_new_until = clock() + _ACQUAINTANCE_SECONDS
        self._since: dict[str, float] = {}

    def begin(self, worker: str) -> None:
        """Starts the ramp of a worker that takes requests from now on."""
        if self._clock() >= self._everybody_is_new_until:
            self._since[worker] = self._clock()

    def forget(self, worker: str) -> None:
        self._since.pop(worker, None)

    def ramp(self, worker: str) -> float:
        """The factor of the worker's weight, from FIRST to 1, in steps of a tenth."""
        since = self._since.get(worker)
        if since is None:
            return 1.0
        ramp = max(FIRST, int((self._clock() - since) / SECONDS * 10) / 10)
        if ramp >= 1:
            del self._since[worker]
        return min(1.0, ramp)
