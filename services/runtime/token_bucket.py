"""A limit on how often something may happen."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable


class TokenBucket:
    """A token bucket (Turner 1986): gains `rate` tokens a second and holds at most `burst`. Starts full."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._seen = clock()

    def take(self, amount: float = 1.0) -> float:
        """Takes tokens and returns 0.0, or returns the seconds until they are available.

        More than `burst` are taken from a full bucket, which then owes the rest.
        """
        self._fill()
        needed = min(amount, self._burst)
        if self._tokens >= needed:
            self._tokens -= amount
            return 0.0
        return (needed - self._tokens) / self._rate

    @property
    def full(self) -> bool:
        self._fill()
        return self._tokens >= self._burst

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._seen) * self._rate)
        self._seen = now
