"""Virtual time that only the simulation advances. It replaces the functions of `time`, and os.urandom.

Install it before any module of Ringmesh is imported: compiled modules look `time.monotonic` up at each call.
"""

import os
import random
import time

_EPOCH_NS = 1_800_000_000_000_000_000
_START_NS = 1_000_000_000_000


class Clock:
    """`now_ns` is the event loop's time; `within_ns` is the time that the running callback has spent so far."""

    def __init__(self):
        self.now_ns = _START_NS
        self.within_ns = 0

    def reset(self):
        self.now_ns, self.within_ns = _START_NS, 0

    def ns(self):
        return self.now_ns + self.within_ns

    def seconds(self):
        return (self.now_ns + self.within_ns) / 1e9


clock = Clock()
real_cpu_seconds = time.process_time


def install():
    """Replaces the clocks of the whole process; it cannot be undone."""
    time.time_ns = lambda: _EPOCH_NS + clock.now_ns + clock.within_ns
    time.time = lambda: (_EPOCH_NS + clock.now_ns + clock.within_ns) / 1e9
    time.monotonic = time.perf_counter = clock.seconds
    time.monotonic_ns = time.perf_counter_ns = clock.ns
    time.process_time = time.thread_time = clock.seconds
    time.process_time_ns = time.thread_time_ns = clock.ns
    os.urandom = random.randbytes
