"""Equal work in flight is done once (after groupcache's singleflight)."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

from services.runtime.driver import Driver, Promise
from services.runtime.errors import DeadlineExceededError, UnavailableError

Result = TypeVar("Result")


class Flight(Promise[Result]):
    """Work under way that others may join, until `end`. `driver` runs it, unless that is left to who began it."""

    __slots__ = ("_flights", "_key", "driver")

    def __init__(self, flights: dict[bytes, Promise[Result] | asyncio.Future[Result]], key: bytes) -> None:
        super().__init__()
        self._flights = flights
        self._key = key
        self.driver: Driver | None = None

    def end(self, outcome: Result | BaseException) -> None:
        """Its result or its error, for all that wait for it."""
        self.driver = None
        if self._flights.get(self._key) is self:
            del self._flights[self._key]
        if isinstance(outcome, asyncio.CancelledError):
            self.settle(UnavailableError("the process is stopping"))
        else:
            self.settle(outcome)


class SingleFlight(Generic[Result]):
    """Callers with one key share one run of the work. Callers and work are driven coroutines.

    A caller that is cancelled, or whose deadline passes, leaves the others and the work alone. A failure reaches all
    that joined; but where it is that the first caller's time was up, one that has more runs the work again.
    """

    def __init__(self) -> None:
        self._flights: dict[bytes, Promise[Result] | asyncio.Future[Result]] = {}

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
        return await self.start(key, work()), False

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: bytes) -> bool:
        """Whether it is in flight."""
        return key in self._flights

    def get(self, key: bytes) -> Promise[Result] | asyncio.Future[Result] | None:
        """What is in flight, to be awaited in a driven coroutine."""
        return self._flights.get(key)

    def start(self, key: bytes, work: Coroutine[Any, Any, Result]) -> Promise[Result]:
        """Begins work that is not in flight."""
        flight = self.begin(key)
        flight.driver = driver = Driver(work, flight.end)
        driver.start()
        return flight

    def begin(self, key: bytes) -> Flight[Result]:
        """Registers work, for others to join; not if the key is in flight already."""
        flight = Flight(self._flights, key)
        self._flights.setdefault(key, flight)
        return flight

    def lead(self, key: bytes, flight: asyncio.Future[Result]) -> None:
        """Others may join `flight`, which is under way; there is none of this key yet."""
        self._flights[key] = flight
        flight.add_done_callback(partial(self._remove, key))

    def close(self) -> None:
        """Cancels the work in flight; those that wait for it get UnavailableError."""
        for flight in list(self._flights.values()):
            if isinstance(flight, Flight) and flight.driver is not None:
                flight.driver.cancel()

    def _remove(self, key: bytes, flight: Promise[Result] | asyncio.Future[Result]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if isinstance(flight, asyncio.Future) and flight.done() and not flight.cancelled():
            flight.exception()  # all callers may have left: asyncio shall not report it as never retrieved
