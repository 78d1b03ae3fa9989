"""What this worker has to do, as routers and callers are told."""

from __future__ import annotations  # compiled by mypyc

import threading
from collections.abc import Callable

# The mean runs over about so many answers: enough that those of one batch, which come together, even out.
_ANSWERS = 64


class Load:
    """Requests taken and not answered, and the mean time between answers while there is work.

    By Little's law their product is what a request that comes now will wait, whatever the models, their batches and
    the cores at work. `clock` in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.requests = 0
        self.answered = 0
        self._clock = clock
        self._interval = 0.0
        self._answers = 0
        self._last = 0.0
        self._answering = threading.Lock()

    def answered_at_once(self, requests: int) -> None:
        """So many never waited. Told from any thread."""
        with self._answering:
            self.answered += requests

    def started(self) -> None:
        """A request was taken."""
        if not self.requests:
            self._last = self._clock()
        self.requests += 1

    def ended(self) -> None:
        """One was answered, or given up."""
        now = self._clock()
        self.requests -= 1
        self.answered_at_once(1)
        self._answers = min(self._answers + 1, _ANSWERS)
        self._interval += (now - self._last - self._interval) / self._answers
        self._last = now

    def metrics(self) -> dict[str, float]:
        """For callers' load balancers."""
        return {"requests": self.requests, "estimated_wait_seconds": self.estimated_wait}

    @property
    def estimated_wait(self) -> float:
        """Seconds. A worker that has stopped answering waits at least as long as it has been silent."""
        if not self.requests:
            return 0.0
        return max(self._interval * self.requests, self._clock() - self._last)
