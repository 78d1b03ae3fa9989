"""The concurrency limit of one worker for one model, derived from the time that requests queue there.

By Little's law (1961), a worker that answers `rate` requests a second makes the next request wait `seconds` if
`rate * seconds` requests are under way. The rate is measured as in BBR (Cardwell et al. 2016): the number of answers
between a request's start and its end, divided by that time. This works for any batch size and converges in one step.
"""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Callable

from router.admission.caller import Priority

# Up to _LEAST requests are always admitted: callers that wait for an answer before they send the next request are no
# overload, however slow the model. Neither are as many requests as the worker runs one by one within the target, up to
# _FEW: with such a short queue something else is slow, and refusing requests does not help.
_LEAST = 8
_FEW = 64
# Minimum duration and number of requests of the window for one decision.
_WINDOW_SECONDS = 0.1
_WINDOW_REQUESTS = 4
# The queueing target is at least this many runs: waiting for the current run to end is no overload.
_RUNS = 2.0
# Growth of the limit after a window without queueing.
_GROWTH = 0.5
_MANY = 10_000


class ConcurrencyLimit:
    """No limit until requests queue longer than `target` seconds on average; then the limit that keeps them at that.

    Queueing is the time of a request beyond the shortest run: a model that does not benefit from batching takes longer
    for larger batches without being busier.
    """

    def __init__(self, target: float, clock: Callable[[], float]) -> None:
        self.in_flight = 0
        self.limit = math.inf
        self._done = 0
        self._target = target
        self._clock = clock
        self._idle = clock()
        self._shortest = math.inf
        self._clear(self._idle)

    def admits(self, priority: Priority) -> bool:
        """Whether one more request may begin. CRITICAL ones may exceed the limit; SHEDDABLE ones are refused first."""
        if self.limit == math.inf:
            return True
        if not self.in_flight and self._clock() - self._idle > self._target:
            # Idle for longer than the target: the overload is over.
            self.limit = self._shortest = math.inf
            return True
        return self.in_flight + 1 <= max(1.0, self.limit * priority.value)

    def begin(self) -> int:
        """Counts a request as under way. Returns the `begun` argument for `completed`."""
        self.in_flight += 1
        return self._done

    def end(self) -> None:
        """Counts a request as ended, with or without an answer."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle = self._clock()

    def completed(self, begun: int, took: float, run: float) -> None:
        """Records an answer. `begun` is from `begin`; `took` is its total time in seconds, `run` the part it ran."""
        self._done += 1
        self._served += self._done - begun
        self._took += took
        self._count += 1
        self._shortest = min(self._shortest, run)
        now = self._clock()
        if self._count >= _WINDOW_REQUESTS and now - self._began >= _WINDOW_SECONDS:
            self._decide(now)
            self._clear(now)

    def _decide(self, now: float) -> None:
        rate = max(self._served / self._took, self._count / (now - self._began))
        took = self._took / self._count
        if self.limit == math.inf:
            # Answered requests show the queue at their arrival; it may be far longer now.
            took = max(took, self.in_flight / rate)
        queued = took - self._shortest
        target = max(self._target, _RUNS * self._shortest)
        if queued > target:
            least = max(_LEAST, min(_FEW, self._target / max(self._shortest, 1e-6)))
            self.limit = max(least, min(self.limit, rate * (target + self._shortest)))
        else:
            self.limit *= 1 + _GROWTH * (1 - max(0.0, queued) / target)

    def _clear(self, now: float) -> None:
        self._began = now
        self._served = self._count = 0
        self._took = 0.0


class ConcurrencyLimits:
    """One limit for each worker and model, made at first use."""

    def __init__(self, target: float, clock: Callable[[], float]) -> None:
        self.target = target
        self._clock = clock
        self._limits: dict[tuple[str, bytes], ConcurrencyLimit] = {}

    def known(self, worker: str, model: bytes) -> ConcurrencyLimit | None:
        """As `of`; None if there is none yet because nothing was sent."""
        return self._limits.get((worker, model))

    def of(self, worker: str, model: bytes) -> ConcurrencyLimit:
        """The limit for a worker, by address, and a model, by digest."""
        limit = self._limits.get((worker, model))
        if limit is None:
            if len(self._limits) >= _MANY:
                # Drops idle limits, such as those of models and workers that are gone. A new one replaces an idle one.
                self._limits = {key: kept for key, kept in self._limits.items() if kept.in_flight}
            limit = self._limits[worker, model] = ConcurrencyLimit(self.target, self._clock)
        return limit
