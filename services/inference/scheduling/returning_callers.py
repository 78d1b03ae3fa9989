"""How long a batch waits for the callers of the previous batch to return."""

from __future__ import annotations  # compiled by mypyc

# The longest wait, as a share of the duration of the last run.
SHARE = 0.25
# After this many consecutive waits in vain, only every PROBE-th batch waits.
MISSES = 2
PROBE = 16


class ReturningCallers:
    """Learns whether callers return, that is, send their next request as soon as they are answered (a closed loop).

    Their requests arrive a little later than the next batch could begin. A batch that does not wait for them splits the
    callers into two halves that take turns, each with a batch half as large. Earlier waits show whether callers return;
    if they do not, batches do not wait. Times are of time.monotonic_ns.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._expected = 0
        self._until = 0
        self._missed = 0
        self._batches = 0

    def answered(self, expected: int, waiting: int, run_ns: int, now: int) -> None:
        """A batch was answered while `waiting` rows wait. If its callers return, there will be `expected` rows."""
        self._batches += 1
        waits = self._missed < MISSES or self._batches % PROBE == 0
        self._expected = expected if waits else 0
        self._waiting = waiting
        self._until = now + int(run_ns * SHARE)

    def wait_until(self, rows: int) -> int:
        """The time at which to stop waiting, with `rows` in the queue; 0 if all expected rows are there."""
        return self._until if rows < self._expected else 0

    def began(self, rows: int) -> None:
        """A batch begins with `rows` in the queue. The wait was worthwhile if half of the expected rows came."""
        if self._expected > self._waiting:
            came = rows - self._waiting
            self._missed = 0 if 2 * came >= self._expected - self._waiting else self._missed + 1
        self._expected = 0
