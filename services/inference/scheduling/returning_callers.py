"""How long a batch waits for the callers of the one before it to come back."""

from __future__ import annotations  # compiled by mypyc

# Of the last run, at most.
SHARE = 0.25
# After so many waits in vain only each PROBE-th batch tries.
MISSES = 2
PROBE = 16


class ReturningCallers:
    """Callers in a closed loop ask again as soon as they are answered, a little later than the next batch could begin.

    Unless it waits for them they split into two halves that take turns, each in a batch half as large. Whether they
    come back is learnt from the waits before, so that others do not wait for nobody. Times are of time.time_ns.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._expected = 0
        self._until = 0
        self._missed = 0
        self._batches = 0

    def answered(self, expected: int, waiting: int, run_ns: int, now: int) -> None:
        """A batch ended with so many rows waiting; with its own they would be `expected`."""
        self._batches += 1
        waits = self._missed < MISSES or self._batches % PROBE == 0
        self._expected = expected if waits else 0
        self._waiting = waiting
        self._until = now + int(run_ns * SHARE)

    def wait_until(self, rows: int) -> int:
        """When to stop waiting, with so many rows there; 0 where all are."""
        return self._until if rows < self._expected else 0

    def began(self, rows: int) -> None:
        """A batch begins with so many rows there. That half of them came back is worth the wait."""
        if self._expected > self._waiting:
            came = rows - self._waiting
            self._missed = 0 if 2 * came >= self._expected - self._waiting else self._missed + 1
        self._expected = 0
