"""A circuit breaker: skips a failed server for a while, longer after each failed probe."""

from __future__ import annotations  # compiled by mypyc

import random
from collections.abc import Callable


class Breaker:
    """Closed: calls pass. Open after a failure: no call passes during a pause, then one at a time as a probe.

    The pause doubles with each failed probe, from `first_pause` to `longest_pause` seconds. A random part of up to
    `spread` of the pause is added, so that the processes of a fleet do not retry at the same time.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        first_pause: float = 0.25,
        longest_pause: float = 10.0,
        spread: float = 0.3,
    ) -> None:
        self._clock = clock
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._spread = spread
        self._pause = first_pause
        self._retry_at: float | None = None

    @property
    def is_open(self) -> bool:
        """True from a failure until a probe succeeds."""
        return self._retry_at is not None

    def allow(self) -> bool:
        """Whether to call now. If a probe is due, returns True once and restarts the pause."""
        if self._retry_at is None:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._next()
        return True

    def success(self) -> None:
        self._retry_at = None
        self._pause = self._first_pause

    def failure(self) -> None:
        """Opens the breaker, or keeps it open for longer."""
        if self._retry_at is not None:
            self._pause = min(self._pause * 2, self._longest_pause)
        self._retry_at = self._next()

    def _next(self) -> float:
        return self._clock() + self._pause * random.uniform(1.0, 1.0 + self._spread)
