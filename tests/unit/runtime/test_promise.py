"""A promise that asyncio tasks await; driven coroutines: test_driver.py."""

import asyncio

import pytest

from services.runtime.driver import Promise


async def _twice(first, second):
    return await first, await second


async def test_a_task_is_given_the_result():
    first, second = Promise(), Promise()
    task = asyncio.create_task(_twice(first, second))
    await asyncio.sleep(0)
    first.settle(1)
    second.settle(2)
    assert await task == (1, 2)


async def test_what_is_done_is_not_waited_for():
    done = Promise()
    done.settle(1)
    done.settle(2)
    with pytest.raises(StopIteration) as end:
        _twice(done, done).send(None)
    assert end.value.value == (1, 1)


async def test_a_task_is_never_resumed_within_another_one():
    wanted = Promise()
    task = asyncio.create_task(_twice(wanted, wanted))
    await asyncio.sleep(0)
    wanted.settle(1)  # in this task
    assert not task.done()
    assert await task == (1, 1)


async def test_a_cancelled_task_gives_up_what_it_waits_for():
    wanted = Promise()
    task = asyncio.create_task(_twice(wanted, wanted))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wanted.settle(1)
    assert wanted.done()


async def test_a_timeout_ends_the_wait():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await Promise()


async def test_asyncio_gathers_and_waits_for_it_as_for_a_future():
    first, second = Promise(), Promise()
    asyncio.get_running_loop().call_soon(first.settle, 1)
    asyncio.get_running_loop().call_soon(second.settle, 2)
    assert await asyncio.gather(first, second) == [1, 2]
    third = Promise()
    done, _ = await asyncio.wait([first, third], return_when=asyncio.FIRST_COMPLETED)
    assert done == {first}
    asyncio.get_running_loop().call_soon(third.settle, 3)
    assert await asyncio.shield(third) == 3
