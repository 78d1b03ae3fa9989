"""Runs coroutines without asyncio tasks: where they are started, and later from callbacks of the event loop.

A task and its future cost three times as much (docs/decisions/0027). A driven coroutine may await promises,
asyncio futures and `ON_LOOP`. Code that needs a current task (asyncio.timeout, TaskGroup) goes through
`in_task`.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from functools import partial
from typing import Any, Final, Generic, TypeVar

from services.runtime import faults
from services.runtime.errors import DeadlineExceededError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class DeadlinePassed(asyncio.CancelledError):
    """Thrown into a coroutine at its deadline. A CancelledError, so that asyncio's locks treat it as a cancellation."""


class _OnLoop:
    def __await__(self) -> Generator[object, None, None]:
        yield self


# A driven coroutine that awaits this continues immediately. A fast path of the native engine begins without a driver:
# there it continues when the requests that came with it have begun too, and those that need not wait are answered.
ON_LOOP: Final = _OnLoop()


class Promise(Generic[Result]):
    """A future result, settled once, on the event loop. The call that settles it resumes the driven coroutines.

    For asyncio (tasks, gather, shield, wait) it stands in for a future with one waiter. If that one is cancelled, so is
    the promise, and a later result is dropped.
    """

    # asyncio recognizes a future by the attribute `_asyncio_future_blocking` of its class.
    __slots__ = ("_asyncio_future_blocking", "_error", "_first", "_is_done", "_others", "_result", "_waiter")

    def __init__(self) -> None:
        self._is_done = False
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._first: Driver | None = None
        self._others: list[Driver] | None = None
        # asyncio's callback, and the context to run it in.
        self._waiter: tuple[Callable[[Any], object], Context | None] | None = None
        self._asyncio_future_blocking = False

    def settle(self, result: Result) -> None:
        """Sets the result; the first outcome counts."""
        if not self._is_done:
            self._result = result
            self._end()

    def fail(self, error: BaseException) -> None:
        """Sets the exception to raise; the first outcome counts."""
        if not self._is_done:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._is_done = True
        first, self._first = self._first, None
        others, self._others = self._others, None
        if first is not None:
            first.resume(self)
        if others is not None:
            for driver in others:
                driver.resume(self)
        if self._waiter is not None:
            self._wake(self._waiter)

    def add(self, driver: Driver) -> None:
        if self._first is None:
            self._first = driver
        elif self._others is None:
            self._others = [driver]
        else:
            self._others.append(driver)

    def __await__(self) -> Generator[object, None, Result]:
        if not self._is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def result(self) -> Result:
        """The result; it must be done. This method and those below behave like asyncio.Future's."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def done(self) -> bool:
        """Whether it has an outcome."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether its waiter was cancelled."""
        return isinstance(self._error, asyncio.CancelledError)

    def exception(self) -> BaseException | None:
        """The exception, or None. Raises CancelledError if it was cancelled."""
        if isinstance(self._error, asyncio.CancelledError):
            raise self._error
        return self._error

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The running event loop."""
        return asyncio.get_running_loop()

    def add_done_callback(self, waiter: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Registers `waiter`, to be called soon after this is done. There can be one at a time."""
        self._waiter = (waiter, context)
        if self._is_done:
            self._wake(self._waiter)

    def remove_done_callback(self, waiter: Callable[[Any], object]) -> int:
        """Returns the number of callbacks removed."""
        if self._waiter is None or self._waiter[0] != waiter:
            return 0
        self._waiter = None
        return 1

    def cancel(self, msg: object = None) -> bool:
        """Cancels it; returns False if it was done already."""
        is_open = not self._is_done
        self.fail(asyncio.CancelledError())
        return is_open

    def _wake(self, waiter: tuple[Callable[[Any], object], Context | None]) -> None:
        self._waiter = None
        # Not inline: another task may be running now.
        asyncio.get_running_loop().call_soon(waiter[0], self, context=waiter[1])


class Driver:
    """Runs `coroutine` to its end; `done` gets its result, or the exception that it raised.

    Cancellation raises asyncio.CancelledError in the coroutine immediately, at its await. The awaitable itself is not
    cancelled.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], done: Callable[[Any], None]) -> None:
        self._coroutine = coroutine
        self._done: Callable[[Any], None] | None = done
        self._waits_for: object = None
        self._is_running = False
        # The exception to raise in the coroutine when it next waits.
        self._interrupt: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, deadline: float | None = None) -> None:
        """Runs the coroutine on the event loop until it waits or ends; `done` may be called before this returns.

        The coroutine is new, or the engine ran it up to its `ON_LOOP`. At `deadline` (time.monotonic)
        DeadlinePassed is raised in it; if the coroutine does not handle that, `done` gets a DeadlineExceededError.
        """
        self._step(None)
        if deadline is not None and self._done is not None:
            delay = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def cancel(self) -> None:
        """Cancels the coroutine: its result is no longer needed."""
        self._throw(asyncio.CancelledError())

    def resume(self, awaited: object) -> None:
        """Continues the coroutine if it waits for `awaited`, which is done."""
        if awaited is self._waits_for:
            self._step(None)

    def _expire(self) -> None:
        self._throw(DeadlinePassed())

    def _throw(self, error: BaseException) -> None:
        if self._is_running:
            self._interrupt = error
        elif self._done is not None:
            self._step(error)

    def _step(self, error: BaseException | None) -> None:
        self._is_running = True
        self._waits_for = None
        coroutine = self._coroutine
        outcome: Any
        try:
            while True:
                waits_for = coroutine.send(None) if error is None else coroutine.throw(error)
                error, self._interrupt = self._interrupt, None
                if error is None and waits_for is not ON_LOOP:
                    break
        except StopIteration as end:
            outcome = end.value
        except DeadlinePassed:
            outcome = DeadlineExceededError("the deadline passed before the answer was computed")
        except (Exception, asyncio.CancelledError) as raised:
            outcome = raised
        else:
            self._is_running = False
            self._wait(waits_for)
            return
        self._end(outcome)

    def _wait(self, awaited: object) -> None:
        self._waits_for = awaited
        if isinstance(awaited, Promise):
            awaited.add(self)
        elif isinstance(awaited, asyncio.Future):
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(self.resume)
        elif awaited is None:  # asyncio.sleep(0)
            self._waits_for = turn = object()
            asyncio.get_running_loop().call_soon(self.resume, turn)
        else:
            self._step(RuntimeError(f"a driven coroutine cannot await {awaited!r}"))  # compiled: once

    def _end(self, outcome: Any) -> None:
        done, self._done = self._done, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        assert done is not None
        try:
            done(outcome)
        except Exception as error:
            faults.internal(log, "the result of a coroutine could not be delivered", error)


async def run(coroutine: Coroutine[Any, Any, Result], deadline: float | None = None) -> Result:
    """Returns, to an asyncio task, the result of a driven coroutine. If the task is cancelled, so is the coroutine.

    Raises DeadlineExceededError at `deadline`, unless the coroutine handles the deadline and ends otherwise.
    """
    ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    driver = Driver(coroutine, partial(_settle, ended))
    driver.start(deadline)
    try:
        return await ended
    finally:
        driver.cancel()


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, asyncio.CancelledError):
        future.cancel()
    elif isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


async def first_of(guess: Coroutine[Any, Any, Result | None], work: Coroutine[Any, Any, Result]) -> Result:
    """Runs both, and returns the first result other than None. Cancels `work` if it is not needed.

    If `work` fails, the result of `guess` counts; if that is None, raises the error. `guess` runs to its end even if
    its result comes too late. Cancelled: `work` is cancelled too.
    """
    first: Promise[Result] = Promise()
    failure: Exception | None = None
    is_guessing = True

    def guessed(outcome: Any) -> None:
        nonlocal is_guessing
        is_guessing = False
        if isinstance(outcome, Exception):
            faults.internal(log, "work beside other work failed", outcome)
        elif outcome is not None and not isinstance(outcome, BaseException):
            first.settle(outcome)
        if failure is not None:
            first.fail(failure)

    def worked(outcome: Any) -> None:
        nonlocal failure
        if not isinstance(outcome, BaseException):
            first.settle(outcome)
        elif is_guessing and isinstance(outcome, Exception):
            failure = outcome
        else:
            first.fail(outcome)

    Driver(guess, guessed).start()
    if first.done():
        work.close()
        return first.result()
    working = Driver(work, worked)
    working.start()
    try:
        return await first
    finally:
        working.cancel()


async def in_task(work: Coroutine[Any, Any, Result]) -> Result:
    """Returns, to a driven coroutine, the result of work that needs an asyncio task.

    If the coroutine is cancelled, so is the task.
    """
    task = asyncio.get_running_loop().create_task(work)
    # Nobody else reads its error if the coroutine was cancelled first: asyncio would log it.
    task.add_done_callback(_read_error)
    try:
        return await task
    finally:
        task.cancel()


def _read_error(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
