"""What a coroutine waits for, completed by a callback: without a future, and where it has a driver, without a task.

Under an asyncio task it stands in for a future. A driver of its own gets it from `coroutine.send(None)`, and says with
`set_callback` what goes on with the coroutine; that is called at once, within `complete`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Completion(Generic[Result]):
    """Completed once, for one waiter. One that is given up (its task was cancelled) is completed without effect."""

    # The name by which a task knows a future.
    __slots__ = ("_asyncio_future_blocking", "_callback", "_is_cancelled", "_result", "_woken", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self._is_cancelled = False
        self._result: Result | None = None
        self._callback: Callable[[], object] | None = None
        # How the task that waits is woken, and in which context.
        self._woken: tuple[Callable[[Any], object], Context | None] | None = None
        self._asyncio_future_blocking = False

    def complete(self, result: Result) -> None:
        """Nothing where it is done."""
        if self.is_done:
            return
        self.is_done = True
        self._result = result
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
        elif self._woken is not None:
            self._wake()

    def set_callback(self, callback: Callable[[], object]) -> None:
        """For a driver without a task. It must not be done."""
        self._callback = callback

    def __await__(self) -> Generator[Any, None, Result]:
        """The result. Raises CancelledError where the task was cancelled."""
        if not self.is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    # What follows is what a task asks of a future.

    def result(self) -> Result:
        """Raises CancelledError where it was given up."""
        if self._is_cancelled:
            raise asyncio.CancelledError
        return self._result  # type: ignore[return-value]

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The one that runs."""
        return asyncio.get_running_loop()

    def add_done_callback(self, woken: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Called soon after it is done."""
        self._woken = (woken, context)
        if self.is_done:
            self._wake()

    def cancel(self, msg: object = None) -> bool:
        """Whether it had not been done."""
        if self.is_done:
            return False
        self.is_done = self._is_cancelled = True
        if self._woken is not None:
            self._wake()
        return True

    def _wake(self) -> None:
        assert self._woken is not None
        woken, context = self._woken
        self._woken = None
        # Not at once: another task may be running now.
        asyncio.get_running_loop().call_soon(woken, self, context=context)
