"""Coroutines without tasks: how they are resumed, cancelled and ended."""

import asyncio
import gc
import time

import pytest

from services.runtime import driver
from services.runtime.driver import ON_LOOP, Driver, Promise, first_of, in_task
from services.runtime.errors import DeadlineExceededError


class Driven:
    """A coroutine that is driven: its outcomes, and what it did."""

    def __init__(self, coroutine, deadline=None):
        self.outcomes = []
        self.driver = Driver(coroutine, self.outcomes.append)
        self.driver.start(deadline)

    @property
    def outcome(self):
        (outcome,) = self.outcomes
        return outcome


async def awaited(promise, released=None):
    try:
        return await promise
    finally:
        if released is not None:
            released.append(True)


async def test_a_coroutine_that_never_waits_ends_where_it_is_started():
    async def work():
        return 7

    assert Driven(work()).outcome == 7


async def test_it_is_resumed_by_the_call_that_settles_its_promise():
    promise = Promise()
    one, other = Driven(awaited(promise)), Driven(awaited(promise))
    assert (one.outcomes, other.outcomes) == ([], [])
    promise.settle(7)
    promise.settle(8)
    assert (one.outcome, other.outcome) == (7, 7)
    assert Driven(awaited(promise)).outcome == 7


async def test_the_error_of_a_promise_is_raised_where_it_is_awaited():
    promise = Promise()
    one = Driven(awaited(promise))
    promise.fail(ValueError("wrong"))
    assert isinstance(one.outcome, ValueError)


async def test_it_awaits_futures_tasks_and_a_turn_of_the_loop():
    async def work():
        await asyncio.sleep(0)
        made = await asyncio.get_running_loop().run_in_executor(None, lambda: 3)
        return made + await asyncio.create_task(asyncio.sleep(0, 4))

    assert await driver.run(work()) == 7


async def test_it_goes_on_at_once_on_the_event_loop():
    async def work():
        await ON_LOOP
        return 7

    assert Driven(work()).outcome == 7


async def test_a_cancelled_coroutine_releases_what_it_holds_and_leaves_what_it_waits_for_alone():
    promise, future, released = Promise(), asyncio.get_running_loop().create_future(), []
    for waits_for in (promise, future):
        one = Driven(awaited(waits_for, released))
        one.driver.cancel()
        one.driver.cancel()
        assert isinstance(one.outcome, asyncio.CancelledError)
    assert released == [True, True]
    assert not future.done()
    promise.settle(7)
    future.set_result(7)
    await asyncio.sleep(0)
    assert len(one.outcomes) == 1


async def test_a_coroutine_that_cancels_itself_is_cancelled_where_it_next_waits():
    steps = []

    async def work():
        one.driver.cancel()
        steps.append("goes on")
        await Promise()
        steps.append("never here")

    one = Driven.__new__(Driven)
    one.outcomes = []
    one.driver = Driver(work(), one.outcomes.append)
    one.driver.start()
    assert isinstance(one.outcome, asyncio.CancelledError)
    assert steps == ["goes on"]


async def test_a_coroutine_may_go_on_after_it_was_cancelled():
    first, second = Promise(), Promise()

    async def work():
        try:
            await first
        except asyncio.CancelledError:
            return await second

    one = Driven(work())
    one.driver.cancel()
    first.settle(6)
    assert one.outcomes == []
    second.settle(7)
    assert one.outcome == 7


async def test_at_its_deadline_it_ends_and_releases_what_it_holds():
    released = []
    one = Driven(awaited(Promise(), released), time.monotonic() - 1)
    while not one.outcomes:
        await asyncio.sleep(0)
    assert isinstance(one.outcome, DeadlineExceededError)
    assert released == [True]


async def test_one_that_ends_in_time_has_no_timer_left():
    promise = Promise()
    one = Driven(awaited(promise), time.monotonic() + 60)
    timer = one.driver._timer
    promise.settle(7)
    assert one.outcome == 7
    assert timer.cancelled()


async def test_a_lock_of_asyncio_is_passed_on_by_one_whose_deadline_passes():
    lock, order = asyncio.Lock(), []

    async def work(name):
        async with lock:
            order.append(name)

    await lock.acquire()
    late, waits = Driven(work("late"), time.monotonic() - 1), Driven(work("waits"))
    # Given to the first in line, whose time is up by the time that it would be resumed.
    asyncio.get_running_loop().call_later(0, lock.release)
    while not (late.outcomes and waits.outcomes):
        await asyncio.sleep(0)
    assert order[-1] == "waits"
    assert not lock.locked()


async def test_what_it_cannot_await_is_an_error_of_its_own():
    class Odd:
        def __await__(self):
            yield "odd"

    async def work():
        await Odd()

    assert isinstance(Driven(work()).outcome, RuntimeError)


async def test_an_outcome_that_cannot_be_delivered_is_logged(caplog):
    def done(_):
        raise ValueError("not delivered")

    async def work():
        return 7

    Driver(work(), done).start()
    assert "not delivered" in caplog.text


async def test_in_a_task_it_is_cancelled_with_the_task():
    released = []
    task = asyncio.create_task(driver.run(awaited(Promise(), released)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert released == [True]


async def test_in_a_task_it_raises_at_its_deadline():
    with pytest.raises(DeadlineExceededError):
        await driver.run(awaited(Promise()), time.monotonic() + 0.01)


async def test_work_in_a_task_is_cancelled_with_the_coroutine_that_awaits_it():
    released = []

    async def needs_a_task():
        try:
            async with asyncio.timeout(60):
                await asyncio.sleep(60)
        finally:
            released.append(True)

    one = Driven(in_task(needs_a_task()))
    await asyncio.sleep(0)
    one.driver.cancel()
    await asyncio.sleep(0)
    assert released == [True]
    assert isinstance(one.outcome, asyncio.CancelledError)


async def test_an_error_of_work_that_nobody_awaits_any_more_is_not_logged(caplog):
    async def fails_at_its_end():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError from None

    one = Driven(in_task(fails_at_its_end()))
    await asyncio.sleep(0)
    one.driver.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    del one
    gc.collect()
    assert not caplog.records


class Racing:
    """`first_of` a guess and work that each wait for a promise."""

    def __init__(self, guess=None):
        self.guess, self.work, self.ended = Promise() if guess is None else guess, Promise(), []
        self.driven = Driven(first_of(self._run("guess", self.guess), self._run("work", self.work)))

    async def _run(self, name, promise):
        try:
            return await promise
        finally:
            self.ended.append(name)


async def test_of_a_guess_and_work_the_first_result_counts_and_work_that_is_not_needed_is_cancelled():
    race = Racing()
    race.guess.settle("guessed")
    assert race.driven.outcome == "guessed"
    assert race.ended == ["guess", "work"]


async def test_a_guess_that_comes_too_late_runs_to_its_end():
    race = Racing()
    race.work.settle("worked")
    assert race.driven.outcome == "worked"
    race.guess.settle("guessed")
    assert race.ended == ["work", "guess"]
    assert race.driven.outcome == "worked"


async def test_work_counts_after_a_guess_without_a_result():
    race = Racing()
    race.guess.settle(None)
    assert race.driven.outcomes == []
    race.work.settle("worked")
    assert race.driven.outcome == "worked"


@pytest.mark.parametrize("guess", ["guessed", None])
async def test_if_work_fails_the_guess_counts_before_its_error(guess):
    race = Racing()
    error = ValueError("failed")
    race.work.fail(error)
    assert race.driven.outcomes == []
    race.guess.settle(guess)
    assert race.driven.outcome is (guess or error)


async def test_a_guess_that_raises_is_logged_and_work_counts(caplog):
    race = Racing()
    race.guess.fail(ValueError("nobody foresaw it"))
    assert "nobody foresaw it" in caplog.text
    race.work.settle("worked")
    assert race.driven.outcome == "worked"


@pytest.mark.filterwarnings("error")
async def test_work_does_not_start_if_the_guess_has_a_result_immediately():
    guess = Promise()
    guess.settle("guessed")
    race = Racing(guess)
    assert race.driven.outcome == "guessed"
    assert race.ended == ["guess"]


async def test_if_both_are_cancelled_work_is_cancelled():
    race = Racing()
    race.driven.driver.cancel()
    assert isinstance(race.driven.outcome, asyncio.CancelledError)
    assert race.ended == ["work"]
