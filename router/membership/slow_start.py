"""Newcomers take little at first: their caches, threads and kernels are cold."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable

SECONDS = 10.0
FIRST = 0.1
# A router that has just started knows no newcomers, only workers that it has not met.
_ACQUAINTANCE_SECONDS = 5.0


class SlowStart:
    """How far each worker has started. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._everybody_is_new_until = clock() + _ACQUAINTANCE_SECONDS
        self._since: dict[str, float] = {}

    def begin(self, worker: str) -> None:
        """It takes requests from now on."""
        if self._clock() >= self._everybody_is_new_until:
            self._since[worker] = self._clock()

    def forget(self, worker: str) -> None:
        """It has left."""
        self._since.pop(worker, None)

    def ramp(self, worker: str) -> float:
        """The part of its weight to count, FIRST to 1, in steps of a tenth."""
        since = self._since.get(worker)
        if since is None:
            return 1.0
        ramp = max(FIRST, int((self._clock() - since) / SECONDS * 10) / 10)
        if ramp >= 1:
            del self._since[worker]
        return min(1.0, ramp)
