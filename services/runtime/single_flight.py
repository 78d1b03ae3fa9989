"""Equal work in flight is done once (after groupcache's singleflight)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from services.runtime.driver import Driver, Promise
from services.runtime.errors import DeadlineExceededError, UnavailableError

Result = TypeVar("Result")
Flight: TypeAlias = "Promise[Result] | asyncio.Future[Result]"


class SingleFlight(Generic[Result]):
    """Callers with one key share one run of the work. Callers and work are driven coroutines.

    A caller that is cancelled, or whose deadline passes, leaves the others and the work alone. A failure reaches all
    that joined; but where it is that the first caller's time was up, one that has more runs the work again.
    """

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight[Result]] = {}
        self._drivers: dict[Promise[Result], Driver] = {}

    async def run(
        self, key: bytes, work: Callable[[], Coroutine[Any, Any, Result]], deadline: float | None
    ) -> tuple[Result, bool]:
        """The result, and whether it was another caller's. `deadline` is this caller's, in time.monotonic."""
        while (flight := self._flights.get(key)) is not None:
            try:
                return await flight, True
            except DeadlineExceededError:
                if deadline is not None and deadline <= time.monotonic():
                    raise
                self._remove(key, flight)
        led = self.begin(key)
        driver = self._drivers[led] = Driver(work(), partial(self.end, key, led))
        driver.start()
        return await led, False

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: bytes) -> bool:
        """Whether it is in flight."""
        return key in self._flights

    def get(self, key: bytes) -> Flight[Result] | None:
        """What is in flight, to be awaited in a driven coroutine."""
        return self._flights.get(key)

    def begin(self, key: bytes) -> Promise[Result]:
        """Registers work under way, for others to join, until `end`. Not joined if the key is in flight already."""
        flight: Promise[Result] = Promise()
        self._flights.setdefault(key, flight)
        return flight

    def end(self, key: bytes, flight: Promise[Result], outcome: Result | BaseException) -> None:
        """Gives what `begin` returned its result or its error."""
        self._remove(key, flight)
        self._drivers.pop(flight, None)
        if isinstance(outcome, asyncio.CancelledError):
            flight.settle(UnavailableError("the process is stopping"))
        else:
            flight.settle(outcome)

    def lead(self, key: bytes, flight: asyncio.Future[Result]) -> None:
        """Others may join `flight`, which is under way; there is none of this key yet."""
        self._flights[key] = flight
        flight.add_done_callback(partial(self._remove, key))

    def close(self) -> None:
        """Cancels the work in flight; those that wait for it get UnavailableError."""
        for driver in list(self._drivers.values()):
            driver.cancel()

    def _remove(self, key: bytes, flight: Flight[Result]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if isinstance(flight, asyncio.Future) and not flight.cancelled() and flight.done():
            flight.exception()  # all callers may have left: asyncio shall not report it as never retrieved
