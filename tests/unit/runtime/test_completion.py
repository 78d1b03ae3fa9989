"""Something that is waited for, by a task and by a driver without one."""

import asyncio

import pytest

from services.runtime.completion import Completion


async def _twice(first, second):
    return await first, await second


def test_a_driver_without_a_task_goes_on_within_the_completion():
    first, second, results = Completion(), Completion(), []
    coroutine = _twice(first, second)

    def go_on(_=None):
        try:
            coroutine.send(None).set_callback(go_on)
        except StopIteration as end:
            results.append(end.value)

    go_on()
    first.complete(1)
    assert results == []
    second.complete(2)
    assert results == [(1, 2)]


async def test_a_task_is_given_the_result():
    first, second = Completion(), Completion()
    task = asyncio.create_task(_twice(first, second))
    await asyncio.sleep(0)
    first.complete(1)
    second.complete(2)
    assert await task == (1, 2)


async def test_what_is_done_is_not_waited_for():
    done = Completion()
    done.complete(1)
    done.complete(2)
    with pytest.raises(StopIteration) as end:
        _twice(done, done).send(None)
    assert end.value.value == (1, 1)


async def test_a_task_is_never_resumed_within_another_one():
    wanted = Completion()
    task = asyncio.create_task(_twice(wanted, wanted))
    await asyncio.sleep(0)
    wanted.complete(1)  # in this task
    assert not task.done()
    assert await task == (1, 1)


async def test_a_cancelled_task_gives_up_what_it_waits_for():
    wanted = Completion()
    task = asyncio.create_task(_twice(wanted, wanted))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wanted.complete(1)
    assert wanted.done()


async def test_a_timeout_ends_the_wait():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await Completion()


async def test_asyncio_gathers_and_waits_for_it_as_for_a_future():
    first, second = Completion(), Completion()
    asyncio.get_running_loop().call_soon(first.complete, 1)
    asyncio.get_running_loop().call_soon(second.complete, 2)
    assert await asyncio.gather(first, second) == [1, 2]
    third = Completion()
    done, _ = await asyncio.wait([first, third], return_when=asyncio.FIRST_COMPLETED)
    assert done == {first}
    asyncio.get_running_loop().call_soon(third.complete, 3)
    assert await asyncio.shield(third) == 3
