"""How many requests may be under way to one worker for one model, found from how long they queue there.

By Little's law (1961), a worker that answers `rate` requests a second is `rate * seconds` requests away from
making the next one wait that long. The rate is measured as BBR does (Cardwell et al. 2016): what was answered from
a request's begin to its end, over that time. It holds whatever batches look like, and converges in one step.
"""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Callable

from router.admission.caller import Priority

# So many are never refused: callers who wait for their answers before they ask again are not an overload, however slow
# the model. Nor is what the worker would run one by one within the target, up to a bound: where so little queues,
# something else is slow, and refusing cures nothing.
_LEAST = 8
_FEW = 64
# What one decision rests on.
_WINDOW_SECONDS = 0.1
_WINDOW_REQUESTS = 4
# To wait for the run under way to end is not overload, however long it is.
_RUNS = 2.0
# In a window without any queueing, so fast it grows.
_GROWTH = 0.5
_MANY = 10_000


class ConcurrencyLimit:
    """No limit until requests queue for longer than `target` seconds on average; then as many as keep them at that.

    Queueing is all that a request took beyond the shortest run: a model that does not gain from batches is slower in
    larger ones, and no busier.
    """

    __slots__ = (
        "_began",
        "_clock",
        "_count",
        "_done",
        "_idle",
        "_served",
        "_shortest",
        "_target",
        "_took",
        "in_flight",
        "limit",
    )

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
        """Whether one more may begin. What is critical may when others may not; what is sheddable is refused first."""
        if self.limit == math.inf:
            return True
        if not self.in_flight and self._clock() - self._idle > self._target:
            # Nothing has queued for so long that nothing of the overload is left.
            self.limit = self._shortest = math.inf
            return True
        return self.in_flight + 1 <= max(1.0, self.limit * priority.value)

    def begin(self) -> int:
        """One more is under way; returns what `completed` wants to know of it."""
        self.in_flight += 1
        return self._done

    def end(self) -> None:
        """One less is under way, however it ended."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle = self._clock()

    def completed(self, begun: int, took: float, run: float) -> None:
        """A request has an answer: what `begin` returned, seconds it took in all, and seconds of these it ran."""
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
            # Those answered tell how long the queue was when they came; it may have become far longer.
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
    """One for each worker and model, made at first use."""

    def __init__(self, target: float, clock: Callable[[], float]) -> None:
        self.target = target
        self._clock = clock
        self._limits: dict[tuple[str, bytes], ConcurrencyLimit] = {}

    def known(self, worker: str, model: bytes) -> ConcurrencyLimit | None:
        """As `of`, from any thread; None where nothing was sent yet."""
        return self._limits.get((worker, model))

    def of(self, worker: str, model: bytes) -> ConcurrencyLimit:
        """For the worker at an address and the digest of a model."""
        limit = self._limits.get((worker, model))
        if limit is None:
            if len(self._limits) >= _MANY:
                # Of models and workers that are no more; one at rest is as good as new.
                self._limits = {key: kept for key, kept in list(self._limits.items()) if kept.in_flight}
            # A refusal on the receiving thread may have been here meanwhile.
            limit = self._limits.setdefault((worker, model), ConcurrencyLimit(self.target, self._clock))
        return limit
