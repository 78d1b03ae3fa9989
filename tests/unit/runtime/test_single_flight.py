import asyncio
import time

import pytest

from services.runtime import driver
from services.runtime.errors import DeadlineExceededError, InternalError
from services.runtime.single_flight import SingleFlight


class Work:
    """Work that ends when told to, fails once if told to, and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.runs += 1
        await self.go.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
        return "done"


async def run(flights, work, deadline=None):
    return await driver.run(flights.run(b"key", work, deadline), deadline)


async def start(flights, work, count, deadline=None):
    callers = [asyncio.create_task(run(flights, work, deadline)) for _ in range(count)]
    await asyncio.sleep(0)
    return callers


async def test_equal_keys_in_flight_run_once_and_all_get_the_result():
    flights, work = SingleFlight(), Work()
    callers = await start(flights, work, 100)
    work.go.set()
    results = await asyncio.gather(*callers)
    assert work.runs == 1
    assert sorted(joined for _, joined in results) == [False] + [True] * 99
    assert {result for result, _ in results} == {"done"}


async def test_a_landed_flight_is_not_a_cache():
    flights, work = SingleFlight(), Work()
    work.go.set()
    await run(flights, work)
    await run(flights, work)
    assert work.runs == 2


async def test_a_cancelled_caller_leaves_the_others_and_the_work_alone():
    flights, work = SingleFlight(), Work()
    first, second = await start(flights, work, 2)
    first.cancel()
    await asyncio.sleep(0)
    work.go.set()
    assert await second == ("done", True)
    assert first.cancelled()
    assert work.runs == 1


async def test_a_failure_reaches_all_that_joined_and_is_not_kept():
    flights, work = SingleFlight(), Work()
    work.error = InternalError("broken")
    callers = await start(flights, work, 3)
    work.go.set()
    assert all(isinstance(error, InternalError) for error in await asyncio.gather(*callers, return_exceptions=True))
    assert await run(flights, work) == ("done", False)


async def test_one_with_time_left_runs_again_when_the_first_ran_out_of_it():
    flights, work = SingleFlight(), Work()
    work.error = DeadlineExceededError("late")
    now = time.monotonic()
    (hasty,) = await start(flights, work, 1, deadline=now - 1)
    (patient,) = await start(flights, work, 1, deadline=now + 60)
    work.go.set()
    with pytest.raises(DeadlineExceededError):
        await hasty
    assert await patient == ("done", False)
    assert work.runs == 2


async def test_each_caller_gets_its_own_deadline_and_the_work_goes_on_for_the_rest():
    flights, work = SingleFlight(), Work()
    patient, *_ = await start(flights, work, 1)
    hasty, *_ = await start(flights, work, 1, deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceededError):
        await hasty
    assert not patient.done()
    work.go.set()
    assert await patient == ("done", False)
    assert work.runs == 1


async def test_a_first_caller_out_of_time_leaves_the_work_to_those_that_joined():
    flights, work = SingleFlight(), Work()
    first, *_ = await start(flights, work, 1, deadline=time.monotonic() + 0.02)
    joined, *_ = await start(flights, work, 1)
    with pytest.raises(DeadlineExceededError):
        await first
    work.go.set()
    assert await joined == ("done", True)
    assert work.runs == 1
