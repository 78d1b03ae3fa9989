"""Equal work in flight is done once (after groupcache's singleflight)."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

from services.runtime.errors import DeadlineExceededError

Result = TypeVar("Result")


class SingleFlight(Generic[Result]):
    """Callers with one key share one run of the work.

    A caller that is cancelled, or whose deadline passes, leaves the others and the work alone. A failure reaches all
    that joined; but where it is that the first caller's time was up, one that has more runs the work again.
    """

    def __init__(self) -> None:
        self._flights: dict[bytes, asyncio.Future[Result]] = {}

    async def run(
        self, key: bytes, work: Callable[[], Coroutine[Any, Any, Result]], deadline: float | None
    ) -> tuple[Result, bool]:
        """The result, and whether it was another caller's.

        `deadline` is this caller's, in time.monotonic. Raises DeadlineExceededError when it passes.
        """
        while (flight := self._flights.get(key)) is not None:
            await _wait(flight, deadline)
            try:
                return flight.result(), True
            except DeadlineExceededError:
                if deadline is not None and deadline <= time.monotonic():
                    raise
                self.landed(key, flight)
        flight = asyncio.create_task(work())
        self.lead(key, flight)
        await _wait(flight, deadline)
        return flight.result(), False

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: bytes) -> bool:
        """Whether it is in flight."""
        return key in self._flights

    def get(self, key: bytes) -> asyncio.Future[Result] | None:
        """What is in flight, to be waited for behind asyncio.shield."""
        return self._flights.get(key)

    def lead(self, key: bytes, flight: asyncio.Future[Result]) -> None:
        """Others may join `flight`, which is under way; there is none of this key yet."""
        self._flights[key] = flight
        flight.add_done_callback(partial(self.landed, key))

    def begin(self, key: bytes) -> asyncio.Future[Result]:
        """Work that its leader does without a task, for others to join, until `end`; there is none of this key yet."""
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        return flight

    def end(self, key: bytes, flight: asyncio.Future[Result], result: Result | Exception) -> None:
        """What `begin` returned has come to this."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.done():  # closed
            return
        if isinstance(result, Exception):
            flight.set_exception(result)
            flight.exception()  # there may be nobody else: asyncio shall not report it as never retrieved
        else:
            flight.set_result(result)

    def close(self) -> None:
        """Cancels what is in flight; those that wait for it are cancelled too."""
        for flight in list(self._flights.values()):
            flight.cancel()

    def landed(self, key: bytes, flight: asyncio.Future[Result]) -> None:
        """`flight` is done and is not joined any more. Called by itself soon after."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # all callers may have left: asyncio shall not report it as never retrieved


async def _wait(flight: asyncio.Future[Any], deadline: float | None) -> None:
    """Until it is done, whatever becomes of this caller; asyncio.wait does the same at three times the cost."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    timer = None if deadline is None else loop.call_later(max(0.0, deadline - time.monotonic()), wake)
    flight.add_done_callback(wake)
    try:
        await woken
    finally:
        flight.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()
    if not flight.done():
        raise DeadlineExceededError("the deadline passed before the answer was computed")
