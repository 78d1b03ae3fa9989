"""Requests that were found wrong, kept for a while where that is configured."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.runtime.errors import InvalidArgumentError

_MAX_KEPT = 10_000


class Refusals:
    """Errors that are the request's own fault, by key, for `seconds` (0: not kept). Other failures are never kept."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[bytes, tuple[float, InvalidArgumentError]] = {}

    def keep(self, key: bytes, error: InvalidArgumentError) -> None:
        """From now on the same request is refused at once."""
        if self._seconds:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = (self._clock() + self._seconds, error)

    def check(self, key: bytes) -> None:
        """Raises what was kept."""
        if not self._kept:
            return
        until, error = self._kept.get(key, (0.0, None))
        if error is None:
            return
        if self._clock() >= until:
            del self._kept[key]
            return
        raise InvalidArgumentError(error.message, field=error.field)
