"""The retry budget of a router: a share of its traffic, so that retries do not overload a fleet in trouble.

After Finagle's RetryBudget: 20 % of the requests of the last ten seconds, plus 10 a second, so that retries work at low
traffic too. Envoy's budget is 20 % of the requests under way, and at least 3.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable

SHARE = 0.2
RESERVE_PER_SECOND = 10
WINDOW_SECONDS = 10


class RetryBudget:
    """Counts first attempts and retries of the last WINDOW_SECONDS."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.denied = 0
        # By second: the retries that its requests allow, minus the retries made in it.
        self._balance = [0.0] * WINDOW_SECONDS
        self._second = int(clock())

    def request(self) -> None:
        """Counts the first attempt of a request."""
        self._slot()
        self._balance[self._second % WINDOW_SECONDS] += SHARE

    def take(self) -> bool:
        """Whether a retry is allowed; if so, counts it."""
        self._slot()
        if sum(self._balance) + RESERVE_PER_SECOND * WINDOW_SECONDS < 1:
            self.denied += 1
            return False
        self._balance[self._second % WINDOW_SECONDS] -= 1
        return True

    def _slot(self) -> None:
        now = int(self._clock())
        for second in range(max(self._second + 1, now - WINDOW_SECONDS + 1), now + 1):
            self._balance[second % WINDOW_SECONDS] = 0.0
        self._second = max(self._second, now)
