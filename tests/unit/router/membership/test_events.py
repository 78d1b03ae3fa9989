import asyncio

import pytest

from router.membership.events import MAX_WAITING, Event, MembershipEvents, make
from services.runtime.errors import ResourceExhaustedError
from tests.unit.router.fleets import member


def tell(events, count):
    for number in range(count):
        events.publish(Event.KIND_JOINED, member(f"w{number}"))


async def begin(events):
    """A watcher that has heard what is first."""
    watch = events.watch([make(Event.KIND_JOINED, member("first"))])
    assert (await anext(watch)).address == "first"
    reading = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    return watch, reading


async def test_a_watcher_hears_all_in_order():
    events = MembershipEvents()
    watch, reading = await begin(events)
    tell(events, MAX_WAITING)
    heard = [(await reading).address] + [(await anext(watch)).address for _ in range(MAX_WAITING - 1)]
    assert heard == [f"w{number}" for number in range(MAX_WAITING)]


async def test_what_waits_for_a_watcher_that_does_not_read_is_bounded_and_it_is_told_that_it_missed_some():
    events = MembershipEvents()
    watch, reading = await begin(events)
    tell(events, 1)
    await reading
    tell(events, 20 * MAX_WAITING)
    (queue,) = events._watchers
    assert queue.qsize() <= MAX_WAITING + 1
    with pytest.raises(ResourceExhaustedError, match=f"fell {MAX_WAITING} events behind; watch again"):
        await anext(watch)
    assert not events._watchers


async def test_one_that_does_not_read_costs_the_others_nothing():
    events = MembershipEvents()
    stuck, reading = await begin(events)
    tell(events, 1)
    await reading
    watch, reading = await begin(events)
    for number in range(3 * MAX_WAITING):
        events.publish(Event.KIND_LEFT, member(f"w{number}"))
        assert (await reading).address == f"w{number}"
        reading = asyncio.ensure_future(anext(watch))
    await stuck.aclose()
    events.close()
    with pytest.raises(StopAsyncIteration):
        await reading
