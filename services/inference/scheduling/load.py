"""The load of this worker, as reported to routers and callers."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable

# The mean covers about this many answers, enough to even out the answers of one batch, which come together.
_ANSWERS = 64


class Load:
    """The number of requests in flight, and the mean time between answers while there are any.

    By Little's law their product is the time that a new request will wait, whatever the models, their batches and the
    number of cores. `clock`: in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.requests = 0
        self.answered = 0
        self._clock = clock
        self._interval = 0.0
        self._answers = 0
        self._last = 0.0

    def answered_at_once(self, requests: int) -> None:
        """Counts `requests` that were answered without waiting."""
        self.answered += requests

    def started(self) -> None:
        if not self.requests:
            self._last = self._clock()
        self.requests += 1

    def ended(self) -> None:
        now = self._clock()
        self.requests -= 1
        self.answered += 1
        self._answers = min(self._answers + 1, _ANSWERS)
        self._interval += (now - self._last - self._interval) / self._answers
        self._last = now

    def metrics(self) -> dict[str, float]:
        return {"requests": self.requests, "estimated_wait_seconds": self.estimated_wait}

    @property
    def estimated_wait(self) -> float:
        """In seconds. The wait is at least the time since the last answer, in case the worker has stopped answering."""
        if not self.requests:
            return 0.0
        return max(self._interval * self.requests, self._clock() - self._last)
