"""What a coroutine waits for, completed by a callback: without a future, and where it has a driver, without a task.

A driver of its own gets it from `coroutine.send(None)`, and says with `set_callback` what goes on with the coroutine;
that is called at once, within `complete`. For asyncio (tasks, gather, shield, wait) it stands in for a future.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Completion(Generic[Result]):
    """Completed once, for one waiter. Where that was cancelled, what comes is dropped."""

    # The name by which asyncio knows a future.
    __slots__ = ("_asyncio_future_blocking", "_callback", "_is_cancelled", "_is_done", "_result", "_waiter")

    def __init__(self) -> None:
        self._is_done = False
        self._is_cancelled = False
        self._result: Result | None = None
        self._callback: Callable[[object], object] | None = None
        # Of asyncio, with the context it is to run in.
        self._waiter: tuple[Callable[[Any], object], Context | None] | None = None
        self._asyncio_future_blocking = False

    def complete(self, result: Result) -> None:
        """Nothing where it is done."""
        if not self._is_done:
            self._is_done = True
            self._result = result
            if self._callback is not None:
                callback, self._callback = self._callback, None
                callback(self)
            elif self._waiter is not None:
                self._wake()

    def set_callback(self, callback: Callable[[object], object]) -> None:
        """For a driver without a task: called with this. It must not be done."""
        self._callback = callback

    def __await__(self) -> Generator[Any, None, Result]:
        """The result. Raises CancelledError where the task was cancelled."""
        if not self._is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def done(self) -> bool:
        """Whether it is completed or cancelled. This and what follows is as of asyncio.Future."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether its waiter was."""
        return self._is_cancelled

    def result(self) -> Result:
        """Raises CancelledError where it was cancelled. It must be done."""
        if self._is_cancelled:
            raise asyncio.CancelledError
        return self._result  # type: ignore[return-value]

    def exception(self) -> BaseException | None:
        """None: failures are results here. Raises CancelledError where it was cancelled."""
        self.result()
        return None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The one that runs."""
        return asyncio.get_running_loop()

    def add_done_callback(self, waiter: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Called soon after it is done. One at a time."""
        self._waiter = (waiter, context)
        if self._is_done:
            self._wake()

    def remove_done_callback(self, waiter: Callable[[Any], object]) -> int:
        """How many there were."""
        if self._waiter is None or self._waiter[0] != waiter:
            return 0
        self._waiter = None
        return 1

    def cancel(self, msg: object = None) -> bool:
        """Whether it had not been done."""
        if self._is_done:
            return False
        self._is_done = self._is_cancelled = True
        if self._waiter is not None:
            self._wake()
        return True

    def _wake(self) -> None:
        assert self._waiter is not None
        waiter, context = self._waiter
        self._waiter = None
        # Not at once: another task may be running now.
        asyncio.get_running_loop().call_soon(waiter, self, context=context)
