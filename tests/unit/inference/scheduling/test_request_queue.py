import asyncio
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringmesh.oip.v2.model_config_pb2 import ModelDynamicBatching, ModelQueuePolicy

from services.inference.codec.request import Decoded
from services.inference.scheduling.request_queue import QueuedRequest, RequestQueue
from services.runtime.errors import DeadlineExceededError, ResourceExhaustedError
from tests.unit.clock import Clock

ARRAYS = {"x": np.zeros((1, 1), np.float32)}


class LoopClock(Clock):
    """Stands for time.monotonic, also to the event loop: it only moves when it is told to."""

    async def advance(self, seconds):
        """And lets the event loop run what is due, once."""
        self.now += seconds
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch):
    made = LoopClock(1000.0)
    monkeypatch.setattr(time, "monotonic", made)
    return made


def waiting(*, priority=0, timeout_us=0, deadline=None):
    decoded = Decoded(ARRAYS, 1, ("y",), {}, {}, (), priority, timeout_us)
    return QueuedRequest(decoded, deadline, asyncio.get_running_loop().create_future())


def queue_of(**policy):
    return RequestQueue("m", ModelDynamicBatching(default_queue_policy=policy))


async def test_a_request_fails_when_its_queue_timeout_passes_though_nothing_takes_from_the_queue(clock):
    queue = queue_of(default_timeout_microseconds=500_000)
    queue.push(late := waiting())
    await clock.advance(0.499)
    assert not late.future.done()
    await clock.advance(0.001)
    with pytest.raises(DeadlineExceededError, match="queue timeout of 500000 us"):
        late.future.result()


async def test_a_request_fails_when_its_deadline_passes_though_nothing_takes_from_the_queue(clock):
    queue = queue_of()
    queue.push(late := waiting(deadline=clock.now + 2))
    queue.push(stays := waiting())
    await clock.advance(2)
    with pytest.raises(DeadlineExceededError, match="deadline passed"):
        late.future.result()
    assert [*queue] == [stays]


async def test_the_earliest_is_on_time_whatever_the_order_they_came_in(clock):
    queue = queue_of()
    requests = {seconds: waiting(deadline=clock.now + seconds) for seconds in (9, 3, 6, 1, 7)}
    for each in requests.values():
        queue.push(each)
    for _ in range(10):
        await clock.advance(1)
        passed = clock.now - 1000
        for seconds, each in requests.items():
            assert each.future.done() is (seconds <= passed)
            if each.future.done():
                each.future.exception()


async def test_who_is_out_of_time_frees_the_place_in_the_queue_at_once(clock):
    queue = queue_of(default_timeout_microseconds=1_000_000, max_queue_size=2)
    for _ in range(2):
        queue.push(waiting())
    with pytest.raises(ResourceExhaustedError):
        queue.push(waiting())
    await clock.advance(1)
    for _ in range(2):
        queue.push(waiting())


async def test_who_is_delayed_keeps_the_place_and_the_deadline(clock):
    queue = queue_of(default_timeout_microseconds=1_000_000, max_queue_size=2, timeout_action=ModelQueuePolicy.DELAY)
    queue.push(first := waiting(deadline=clock.now + 5))
    await clock.advance(0.9)
    queue.push(second := waiting())
    await clock.advance(0.1)
    assert [*queue] == [second, first]
    with pytest.raises(ResourceExhaustedError):
        queue.push(waiting())
    await clock.advance(4)
    assert isinstance(first.future.exception(), DeadlineExceededError)
    assert [*queue] == [second]


async def test_a_delay_does_not_hold_up_the_times_of_the_others(clock):
    """Both change the timer: the one that is delayed begins to wait for its deadline, and is not the earliest."""
    queue = queue_of(
        default_timeout_microseconds=1_000_000, allow_timeout_override=True, timeout_action=ModelQueuePolicy.DELAY
    )
    queue.push(waiting(timeout_us=100_000, deadline=clock.now + 60))
    queue.push(second := waiting(deadline=clock.now + 0.5))
    await clock.advance(0.1)
    await clock.advance(0.4)
    assert isinstance(second.future.exception(), DeadlineExceededError)


async def test_who_was_handed_out_and_has_not_begun_is_on_time_too(clock):
    queue = queue_of()
    queue.push(takes_turns := waiting(deadline=clock.now + 1))
    queue.push(runs := waiting(deadline=clock.now + 1))
    assert queue.pop(clock.now) is takes_turns
    assert queue.pop(clock.now) is runs
    queue.began([runs])
    await clock.advance(1)
    assert isinstance(takes_turns.future.exception(), DeadlineExceededError)
    assert not runs.future.done()


async def test_a_timer_that_comes_early_comes_again(clock):
    """As those of uvloop do, by up to a millisecond."""
    queue = queue_of()
    queue.push(late := waiting(deadline=clock.now + 1))
    clock.now += 0.9995
    queue._on_timer()
    assert not late.future.done()
    await clock.advance(0.001)
    assert isinstance(late.future.exception(), DeadlineExceededError)


async def test_requests_that_have_no_time_need_no_timer():
    queue = queue_of()
    queue.push(waiting())
    assert (queue._timer, queue._times) == (None, [])


async def test_what_is_kept_of_requests_that_have_left_is_bounded(clock):
    queue = queue_of()
    for _ in range(10_000):
        queue.push(waiting(deadline=clock.now + 3600))
        queue.began([queue.pop(clock.now)])
    assert len(queue._times) < 100
    assert not queue._watched


LEVELS = ModelDynamicBatching(
    priority_levels=3,
    default_priority_level=2,
    default_queue_policy=ModelQueuePolicy(
        default_timeout_microseconds=5_000_000, allow_timeout_override=True, max_queue_size=3
    ),
    priority_queue_policy={
        1: ModelQueuePolicy(max_queue_size=2),
        3: ModelQueuePolicy(
            default_timeout_microseconds=4_000_000, timeout_action=ModelQueuePolicy.DELAY, max_queue_size=4
        ),
    },
)
SIZES = {1: 2, 2: 3, 3: 4}
# In seconds.
TIMEOUTS = {1: math.inf, 2: 5, 3: 4}
DEFAULT = OVERRIDES = 2
DELAYS = 3

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 4), st.sampled_from([0, 2, 9]), st.sampled_from([None, 1, 3, 6, 12])),
        st.tuples(st.just("pass"), st.integers(0, 4)),
        st.tuples(st.just("pop"), st.integers(0, 4), st.integers(1, 4), st.integers(0, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=40,
)


class Reference:
    """What the queue should hold: by level, those in time and those delayed, as [request, times out, deadline]."""

    def __init__(self) -> None:
        self.levels = {level: ([], []) for level in SIZES}

    def live(self):
        return [each[0] for level in self.levels.values() for part in level for each in part]

    def remove(self, requests):
        for level in self.levels.values():
            for part in level:
                part[:] = [each for each in part if each[0] not in requests]

    def end_times(self, now):
        """Takes out those whose time is up, and returns them."""
        before = self.live()
        for level, (queue, delayed) in self.levels.items():
            late = sorted([each for each in queue if each[1] <= now], key=lambda each: each[1])
            queue[:] = [each for each in queue if each[1] > now]
            delayed += late if level == DELAYS else []
            for part in (queue, delayed):
                part[:] = [each for each in part if each[2] > now]
        return [each for each in before if each not in self.live()]


@settings(max_examples=300)
@given(STEPS)
def test_whatever_the_order_the_queue_holds_the_live_requests_and_fails_the_others_on_time(steps):
    clock = LoopClock(1000.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        asyncio.run(in_this_order(clock, steps))


async def in_this_order(clock, steps):
    queue, reference, everything = RequestQueue("m", LEVELS), Reference(), []

    def agree():
        ended = reference.end_times(clock.now)
        assert all(isinstance(each.future.exception(), DeadlineExceededError) for each in ended)
        assert [*queue] == reference.live()
        assert bool(queue) is bool(reference.live())
        assert not any(each.future.done() for each in queue)

    for action, *told in steps:
        if action == "push":
            priority, timeout, seconds = told
            level = priority if priority in SIZES else DEFAULT
            deadline = None if seconds is None else clock.now + seconds
            limit = TIMEOUTS[level] if level != OVERRIDES or not timeout else min(timeout, TIMEOUTS[level])
            made = waiting(priority=priority, timeout_us=timeout * 10**6, deadline=deadline)
            if sum(map(len, reference.levels[level])) >= SIZES[level]:
                with pytest.raises(ResourceExhaustedError):
                    queue.push(made)
            else:
                queue.push(made)
                everything.append(made)
                reference.levels[level][0].append([made, clock.now + limit, deadline or math.inf])
        elif action == "pass":
            await clock.advance(told[0])
        elif action == "pop":
            jump, takes, back = told
            clock.now += jump  # before a timer can fire
            popped = []
            while len(popped) < takes and (taken := queue.pop(clock.now)) is not None:
                popped.append(taken)
            queue.put_back(popped[len(popped) - min(back, len(popped)) :])
            begun = popped[: len(popped) - min(back, len(popped))]
            queue.began(begun)
            reference.end_times(clock.now)
            assert popped == reference.live()[:takes]
            reference.remove(begun)
        elif everything:
            gone = everything[told[0] % len(everything)]
            if not gone.begun and gone.future.cancel():
                queue.cancelled(gone)
                reference.remove([gone])
        agree()
    await clock.advance(3600)
    agree()
