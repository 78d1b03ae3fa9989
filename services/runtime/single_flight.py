"""Joins equal work in flight, so that it runs once (after groupcache's singleflight)."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from services.runtime.driver import Driver, Promise
from services.runtime.errors import DeadlineExceededError, UnavailableError

Result = TypeVar("Result")


class Flight(Promise[Result]):
    """Work in flight that others may join until `end`. `driver` runs it; None if the caller of `begin` does."""

    def __init__(self, flights: dict[bytes, Flight[Result]], key: bytes) -> None:
        super().__init__()
        self._flights = flights
        self._key = key
        self.driver: Driver | None = None

    def end(self, outcome: Result | BaseException) -> None:
        self.driver = None
        if self._flights.get(self._key) is self:
            del self._flights[self._key]
        if isinstance(outcome, asyncio.CancelledError):
            self.fail(UnavailableError("the process is stopping"))
        elif isinstance(outcome, BaseException):
            self.fail(outcome)
        else:
            self.settle(outcome)


class SingleFlight(Generic[Result]):
    """Callers with one key share one run of the work. Callers and work are driven coroutines.

    If a caller is cancelled or its deadline passes, the work goes on for the others. A failure reaches all callers
    that joined. If the failure is the first caller's deadline, a caller with time left runs the work again.
    """

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight[Result]] = {}

    async def run(
        self, key: bytes, work: Callable[[], Coroutine[Any, Any, Result]], deadline: float | None
    ) -> tuple[Result, bool]:
        """Returns the result, and whether another caller ran the work. `deadline` is this caller's (time.monotonic)."""
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
        return key in self._flights

    def get(self, key: bytes) -> Flight[Result] | None:
        return self._flights.get(key)

    def start(self, key: bytes, work: Coroutine[Any, Any, Result]) -> Promise[Result]:
        """Starts work that is not in flight yet."""
        flight = self.begin(key)
        flight.driver = driver = Driver(work, flight.end)
        driver.start()
        return flight

    def begin(self, key: bytes) -> Flight[Result]:
        """Registers work for others to join; work already in flight with the same key stays registered."""
        flight = Flight(self._flights, key)
        self._flights.setdefault(key, flight)
        return flight

    def close(self) -> None:
        """Cancels the work in flight; its waiters get UnavailableError."""
        for flight in list(self._flights.values()):
            if flight.driver is not None:
                flight.driver.cancel()

    def _remove(self, key: bytes, flight: Flight[Result]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
