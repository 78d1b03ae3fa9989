"""Tail latency of each model: the delay after which a request is hedged."""

from __future__ import annotations  # compiled by mypyc

from collections import deque

from services.runtime.telemetry.recent import Recent

QUANTILE = 0.95
_KEPT = 512
# Minimum number of answers for a 95th percentile.
_LEAST = 64
_EVERY = 32
_MANY = 1000


class TailLatency:
    """The 95th percentile of the latest answer times, by digest of a model, in seconds."""

    def __init__(self) -> None:
        self.models: Recent[bytes, _Times] = Recent(_MANY)

    def observe(self, model: bytes, seconds: float) -> None:
        times = self.models.get(model)
        if times is None:
            times = _Times()
            self.models.put(model, times)
        times.add(seconds)

    def of(self, model: bytes) -> float | None:
        """The 95th percentile of a model; None while there are too few answers."""
        times = self.models.get(model)
        return None if times is None else times.quantile


class _Times:
    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._count = 0
        self.quantile: float | None = None

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self._count += 1
        if self._count >= _LEAST and self._count % _EVERY == 0:
            self.quantile = sorted(self._last)[int(len(self._last) * QUANTILE)]
