"""A reader of bytes from outside, and how it is tried: with any bytes it returns, or raises an error that is allowed.

What it may not do: raise anything else, disagree with another reader of the same format, or take longer than time that
grows with the size of the input.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

# CPU time of the thread for one input, seconds: far more than any needs, far less than quadratic time would take.
BASE_SECONDS = 2.0
SECONDS_PER_BYTE = 20e-6


class TooSlowError(AssertionError):
    """The time for an input grows faster than its size."""


@dataclass(frozen=True)
class Target:
    """`read` takes the bytes, and asserts what must be true of the result. `seeds` are inputs to begin with."""

    name: str
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: Sequence[bytes]

    def run(self, data: bytes) -> None:
        """Raises what `read` may not raise, and TooSlowError."""
        most = BASE_SECONDS + SECONDS_PER_BYTE * len(data)
        # Once more if it was slow: the time of a virtual machine has gaps.
        if self._took(data) > most and (took := self._took(data)) > most:
            raise TooSlowError(f"{self.name}: {took:.1f} s for {len(data)} bytes")

    def _took(self, data: bytes) -> float:
        start = time.thread_time()
        with suppress(*self.allowed):
            self.read(data)
        return time.thread_time() - start


TARGETS: dict[str, Target] = {}


def target(name: str, seeds: Sequence[bytes], *allowed: type[Exception]) -> Callable[[Callable], Callable]:
    """Adds the decorated function to TARGETS."""

    def add(read: Callable) -> Callable:
        TARGETS[name] = Target(name, read, allowed, seeds)
        return read

    return add


def parts(data: bytes) -> list[bytes]:
    """Several values in one input: lengths of one byte, then the values."""
    found = []
    while data:
        size = data[0]
        found.append(data[1 : 1 + size])
        data = data[1 + size :]
    return found


def joined(*values: bytes) -> bytes:
    """The input of which `parts` makes `values`, each of at most 255 bytes."""
    return b"".join(bytes([len(value)]) + value for value in values)
