"""An awaitable that a callback completes, without an asyncio future. A driven coroutine needs no task to await it.

A driver receives the completion from `coroutine.send(None)` and registers with `set_callback` how to resume the
coroutine; `complete` calls that callback inline. For asyncio (tasks, gather, shield, wait) it stands in for a future.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Completion(Generic[Result]):
    """Completed once, for one waiter. If the waiter was cancelled, a later result is dropped."""

    # asyncio recognizes a future by the attribute `_asyncio_future_blocking`.
    __slots__ = ("_asyncio_future_blocking", "_callback", "_is_cancelled", "_is_done", "_result", "_waiter")

    def __init__(self) -> None:
        self._is_done = False
        self._is_cancelled = False
        self._result: Result | None = None
        self._callback: Callable[[object], object] | None = None
        # asyncio's callback, and the context to run it in.
        self._waiter: tuple[Callable[[Any], object], Context | None] | None = None
        self._asyncio_future_blocking = False

    def complete(self, result: Result) -> None:
        """Sets the result and wakes the waiter; does nothing if it is done already."""
        if not self._is_done:
            self._is_done = True
            self._result = result
            if self._callback is not None:
                callback, self._callback = self._callback, None
                callback(self)
            elif self._waiter is not None:
                self._wake()

    def set_callback(self, callback: Callable[[object], object]) -> None:
        """For a driver without a task: `callback` is called with this completion, which must not be done yet."""
        self._callback = callback

    def __await__(self) -> Generator[Any, None, Result]:
        if not self._is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def done(self) -> bool:
        """Whether it is completed or cancelled. This method and those below behave like asyncio.Future's."""
        return self._is_done

    def cancelled(self) -> bool:
        return self._is_cancelled

    def result(self) -> Result:
        """Returns the result; it must be done. Raises CancelledError if it was cancelled."""
        if self._is_cancelled:
            raise asyncio.CancelledError
        return self._result  # type: ignore[return-value]

    def exception(self) -> BaseException | None:
        """Always None: a failure is passed as a result. Raises CancelledError if it was cancelled."""
        self.result()
        return None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def add_done_callback(self, waiter: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Registers `waiter`, to be called soon after this is done. There can be one at a time."""
        self._waiter = (waiter, context)
        if self._is_done:
            self._wake()

    def remove_done_callback(self, waiter: Callable[[Any], object]) -> int:
        if self._waiter is None or self._waiter[0] != waiter:
            return 0
        self._waiter = None
        return 1

    def cancel(self, msg: object = None) -> bool:
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
        # Not inline: another task may be running now.
        asyncio.get_running_loop().call_soon(waiter, self, context=context)
