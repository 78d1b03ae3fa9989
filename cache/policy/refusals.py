"""Caches the errors of invalid requests for a while, if configured."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable

from services.runtime.errors import InvalidArgumentError
from services.runtime.telemetry.recent import Recent

_MAX_KEPT = 10_000


class Refusals:
    """InvalidArgumentErrors by key, cached for `seconds` (0: not cached). Other failures are never cached."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self.kept: Recent[bytes, tuple[float, InvalidArgumentError]] = Recent(_MAX_KEPT)

    def keep(self, key: bytes, error: InvalidArgumentError) -> None:
        """Caches the error, so that an equal request is refused without computing."""
        if self._seconds:
            self.kept.put(key, (self._clock() + self._seconds, error))

    def check(self, key: bytes) -> None:
        """Raises the cached error of `key`, if there is one."""
        kept = self.kept.get(key) if self._seconds else None
        if kept is None:
            return
        until, error = kept
        if self._clock() >= until:
            self.kept.pop(key)
            return
        again = InvalidArgumentError(error.message, field=error.field)
        again.model_digest = error.model_digest
        raise again
