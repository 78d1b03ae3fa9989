import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringmesh.oip.v2.model_config_pb2 import ModelDynamicBatching, ModelQueuePolicy

from services.inference.codec.request import Decoded
from services.inference.execution.inline_runs import InlineRuns
from services.inference.scheduling.batcher import MAX_MEMBERS, PROBE, Batcher, BatchResult
from services.inference.scheduling.request_queue import MAX_QUEUE
from services.runtime.errors import DeadlineExceededError, InternalError, InvalidArgumentError, ResourceExhaustedError
from services.runtime.verdict import YES, Verdict

EXECUTOR = ThreadPoolExecutor(4)
# In microseconds.
SECOND = 10**6


class Doubler:
    """Doubles rows; records its batches; waits for `gate`; refuses rows that hold 13."""

    name = "doubler"
    batchable = YES
    max_batch_rows = 8

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs, outputs):
        self.gate.wait(10)
        self.batches.append(len(inputs["x"]))
        if (inputs["x"] == 13).any():
            raise InvalidArgumentError("13")
        return [inputs["x"] * 2]


def request(value, rows=1, columns=1, **more):
    array = np.full((rows, columns), value)
    return Decoded({"x": array}, rows, ("y",), {}, {}, (columns,), **more)


def inline():
    return InlineRuns(batchable=True, by_cpu=True)


async def held(model, batcher, first):
    """Submits `first` and returns when it runs, and holds the instance."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(first, None))
    for _ in range(3):  # queued, gathered in the next turn of the loop, handed to a thread
        await asyncio.sleep(0)
    return task


async def submit(batcher, *requests):
    tasks = [asyncio.create_task(batcher.submit(made, None)) for made in requests]
    await asyncio.sleep(0)
    return tasks


async def test_an_idle_model_answers_at_once_and_alone():
    model = Doubler()
    result = await Batcher(model, EXECUTOR).submit(request(21), None)
    assert result.arrays[0].tolist() == [[42]]
    assert (result.batch_requests, result.batch_rows) == (1, 1)
    assert result.queued_ns <= result.start_ns <= result.run_ns <= result.end_ns


async def test_what_waits_while_a_batch_runs_is_the_next_batch():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    others = await submit(batcher, *(request(value) for value in range(5)))
    model.gate.set()
    results = await asyncio.gather(first, *others)
    assert model.batches == [1, 5]
    assert [result.arrays[0].tolist() for result in results[1:]] == [[[value * 2]] for value in range(5)]


async def test_a_batch_ends_at_its_limit_and_a_larger_request_goes_alone():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    others = await submit(batcher, request(1, 5), request(2, 4), request(3, 20), request(4, 1))
    model.gate.set()
    await asyncio.gather(first, *others)
    assert model.batches == [1, 5, 4, 20, 1]


async def test_requests_of_another_shape_wait_for_their_own_batch_and_do_not_starve():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    others = await submit(batcher, request(1), request(2, columns=2), request(3), request(4, columns=2))
    model.gate.set()
    results = await asyncio.gather(first, *others)
    assert model.batches == [1, 2, 2]
    assert results[2].arrays[0].tolist() == [[4, 4]]


async def test_a_failing_request_does_not_fail_its_batch_mates():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    others = await submit(batcher, *(request(value) for value in (1, 2, 13, 4, 5)))
    model.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert isinstance(results[3], InvalidArgumentError)
    assert [results[index].arrays[0].item() for index in (1, 2, 4, 5)] == [2, 4, 8, 10]


async def test_a_request_whose_time_is_up_does_not_run():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    late = asyncio.create_task(batcher.submit(request(1), time.monotonic()))
    await asyncio.sleep(0)
    model.gate.set()
    await first
    with pytest.raises(DeadlineExceededError):
        await late
    assert model.batches == [1]


async def test_a_cancelled_request_does_not_run():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    gone, stays = await submit(batcher, request(1), request(2))
    gone.cancel()
    await asyncio.sleep(0)
    model.gate.set()
    await asyncio.gather(first, stays)
    assert model.batches == [1, 1]


async def test_a_full_queue_refuses_more():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(0))
    others = await submit(batcher, *(request(1) for _ in range(MAX_QUEUE)))
    with pytest.raises(ResourceExhaustedError, match=str(MAX_QUEUE)):
        await batcher.submit(request(2), None)
    model.gate.set()
    await asyncio.gather(first, *others)


async def test_instances_run_side_by_side():
    model = Doubler()
    model.gate = threading.Barrier(2, timeout=10)  # passes only when two runs are under way
    batcher = Batcher(model, EXECUTOR, instances=2)
    results = await asyncio.gather(batcher.submit(request(1), None), batcher.submit(request(2), None))
    assert [result.arrays[0].item() for result in results] == [2, 4]


async def test_a_model_that_loses_rows_mixes_up_nobodys_answers():
    model = Doubler()
    model.run = lambda inputs, outputs: [inputs["x"][:1] * 2]
    batcher = Batcher(model, EXECUTOR)
    model.gate.clear()
    results = await asyncio.gather(*(batcher.submit(request(value), None) for value in range(4)))
    assert [result.arrays[0].item() for result in results] == [0, 2, 4, 6]


async def test_closing_waits_for_what_was_submitted():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    tasks = await submit(batcher, *(request(value) for value in range(3)))
    await batcher.close()
    await asyncio.sleep(0)
    assert all(task.done() for task in tasks)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=30))
def test_in_any_mix_each_request_is_answered_as_if_alone(mix):
    async def answer_all():
        batcher = Batcher(Doubler(), EXECUTOR)
        return await asyncio.gather(
            *(batcher.submit(request(value, rows, columns), None) for value, rows, columns in mix),
            return_exceptions=True,
        )

    for (value, rows, columns), result in zip(mix, asyncio.run(answer_all()), strict=True):
        if value == 13:
            assert isinstance(result, InvalidArgumentError | InternalError)
        else:
            assert result.arrays[0].tolist() == [[value * 2] * columns] * rows


async def test_a_delay_gathers_a_batch_of_the_preferred_size():
    model = Doubler()
    batcher = Batcher(
        model,
        EXECUTOR,
        batching=ModelDynamicBatching(max_queue_delay_microseconds=30_000_000, preferred_batch_size=[4]),
    )
    results = await asyncio.gather(*(batcher.submit(request(value), None) for value in range(4)))
    assert model.batches == [4]
    assert [result.arrays[0].item() for result in results] == [0, 2, 4, 6]


async def test_a_delay_ends_though_the_batch_is_not_full():
    model = Doubler()
    results = await asyncio.gather(
        *(
            batcher.submit(request(value), None)
            for batcher in [
                Batcher(model, EXECUTOR, batching=ModelDynamicBatching(max_queue_delay_microseconds=50_000))
            ]
            for value in (1, 2)
        )
    )
    assert model.batches == [2]
    assert [result.arrays[0].item() for result in results] == [2, 4]


class Slow(Doubler):
    """A run takes 50 ms, whatever its rows."""

    def __init__(self, clock) -> None:
        super().__init__()
        self.clock = clock

    def run(self, inputs, outputs):
        self.clock.advance(0.05)
        return super().run(inputs, outputs)


async def test_callers_in_a_closed_loop_come_together_in_one_batch(clock):
    model = Slow(clock)
    batcher = Batcher(model, EXECUTOR)

    async def call_again_and_again():
        for _ in range(4):
            await batcher.submit(request(1), None)

    model.gate.clear()
    callers = [asyncio.create_task(call_again_and_again())]
    for _ in range(3):
        await asyncio.sleep(0)
    callers += [asyncio.create_task(call_again_and_again()) for _ in range(3)]
    await asyncio.sleep(0)
    model.gate.set()
    await asyncio.gather(*callers)
    assert model.batches == [1, 3, 4, 4, 4]


async def test_what_waits_does_not_wait_for_callers_that_stay_away(clock):
    model = Slow(clock)
    batcher = Batcher(model, EXECUTOR)
    first = await held(model, batcher, request(1))
    pair = await submit(batcher, *[request(value, rows=4) for value in (1, 2)])
    (last,) = await submit(batcher, request(3, rows=8))
    model.gate.set()
    await asyncio.gather(first, *pair)
    assert (await last).arrays[0].sum() == 48
    assert model.batches == [1, 8, 8]


async def test_cancelled_requests_do_not_fill_the_queue():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR, batching=ModelDynamicBatching(default_queue_policy={"max_queue_size": 4}))
    first = await held(model, batcher, request(0))
    gone = await submit(batcher, *(request(1) for _ in range(4)))
    for task in gone:
        task.cancel()
    await asyncio.sleep(0)
    (stays,) = await submit(batcher, request(5))
    model.gate.set()
    assert (await stays).arrays[0].item() == 10
    await first


def levels(count, **more):
    return ModelDynamicBatching(priority_levels=count, default_priority_level=count, **more)


async def test_a_higher_priority_goes_first_and_the_default_is_as_configured():
    model = Doubler()
    model.batchable = Verdict("one by one")
    batcher = Batcher(model, EXECUTOR, batching=levels(3))
    first = await held(model, batcher, request(0))
    order = []
    for priority in (3, 0, 2, 1, 99, 2):
        (task,) = await submit(batcher, request(priority, priority=priority))
        task.add_done_callback(lambda task: order.append(task.result().arrays[0].item() // 2))
    model.gate.set()
    await first
    await batcher.close()
    await asyncio.sleep(0)
    assert order == [1, 2, 2, 3, 0, 99]


async def test_levels_share_a_batch_and_what_does_not_fit_keeps_its_place():
    model = Doubler()
    batcher = Batcher(model, EXECUTOR, batching=levels(2))
    first = await held(model, batcher, request(0))
    await submit(batcher, request(1, 6, priority=2), request(2, 5, priority=1), request(3, 2, priority=1))
    model.gate.set()
    await first
    await batcher.close()
    assert model.batches == [1, 7, 6]


async def test_requests_that_wait_for_others_run_before_a_batcher_is_closed():
    model = Doubler()
    an_hour = ModelDynamicBatching(max_queue_delay_microseconds=3600 * SECOND)
    batcher = Batcher(model, EXECUTOR, batching=an_hour)
    waiting = await submit(batcher, request(1), request(2))
    await asyncio.sleep(0)
    assert model.batches == []
    await asyncio.wait_for(batcher.close(), 60)
    assert model.batches == [2]
    await asyncio.gather(*waiting)


async def test_each_level_is_bounded_by_itself():
    model = Doubler()
    batcher = Batcher(
        model, EXECUTOR, batching=levels(2, priority_queue_policy={1: ModelQueuePolicy(max_queue_size=1)})
    )
    first = await held(model, batcher, request(0))
    others = await submit(batcher, request(1, priority=1), request(2, priority=2), request(3, priority=2))
    with pytest.raises(ResourceExhaustedError, match="1 requests waiting"):
        await batcher.submit(request(4, priority=1), None)
    model.gate.set()
    await asyncio.gather(first, *others)


def queue_policy(**policy):
    return ModelDynamicBatching(default_queue_policy=policy)


@pytest.fixture
def pass_seconds(monkeypatch):
    """Makes so much time pass for all that waits."""
    real, passed = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(passed))
    return passed.append


async def test_what_waits_longer_than_its_queue_timeout_is_refused(pass_seconds):
    model = Doubler()
    batcher = Batcher(model, EXECUTOR, batching=queue_policy(default_timeout_microseconds=60 * SECOND))
    first = await held(model, batcher, request(0))
    (late,) = await submit(batcher, request(1, timeout_us=1000 * SECOND))
    pass_seconds(61)
    model.gate.set()
    await first
    with pytest.raises(DeadlineExceededError, match="queue timeout of 60000000 us"):
        await late
    assert model.batches == [1]


async def test_a_request_may_shorten_its_queue_timeout_where_the_model_lets_it(pass_seconds):
    for allowed in (True, False):
        model = Doubler()
        policy = queue_policy(default_timeout_microseconds=1000 * SECOND, allow_timeout_override=allowed)
        batcher = Batcher(model, EXECUTOR, batching=policy)
        first = await held(model, batcher, request(0))
        (short,) = await submit(batcher, request(1, timeout_us=60 * SECOND))
        pass_seconds(61)
        model.gate.set()
        await first
        if allowed:
            with pytest.raises(DeadlineExceededError, match="queue timeout of 60000000 us"):
                await short
        else:
            assert (await short).arrays[0].item() == 2


async def test_a_level_that_delays_serves_the_overdue_after_the_others(pass_seconds):
    model = Doubler()
    model.batchable = Verdict("one by one")
    policy = queue_policy(
        default_timeout_microseconds=1000 * SECOND, allow_timeout_override=True, timeout_action=ModelQueuePolicy.DELAY
    )
    batcher = Batcher(model, EXECUTOR, batching=policy)
    first = await held(model, batcher, request(0))
    order = []
    for value, timeout_us in ((1, 60 * SECOND), (2, 0), (3, 0)):
        (task,) = await submit(batcher, request(value, timeout_us=timeout_us))
        task.add_done_callback(lambda task: order.append(task.result().arrays[0].item() // 2))
    pass_seconds(61)
    model.gate.set()
    await first
    await batcher.close()
    await asyncio.sleep(0)
    assert order == [2, 3, 1]


async def test_a_queue_timeout_fires_while_all_instances_are_busy(pass_seconds):
    model = Doubler()
    policy = queue_policy(default_timeout_microseconds=SECOND, max_queue_size=1)
    batcher = Batcher(model, EXECUTOR, batching=policy)
    running = await held(model, batcher, request(0))
    (late,) = await submit(batcher, request(1))
    pass_seconds(1.1)
    with pytest.raises(DeadlineExceededError, match="queue timeout"):
        await late
    (next_one,) = await submit(batcher, request(2))  # it has the place
    assert not running.done()
    model.gate.set()
    assert (await next_one).arrays[0].item() == 4
    await running


async def test_a_deadline_passes_while_all_instances_are_busy(pass_seconds):
    model = Doubler()
    batcher = Batcher(model, EXECUTOR)
    running = await held(model, batcher, request(0))
    late = asyncio.create_task(batcher.submit(request(1), time.monotonic() + 1))
    await asyncio.sleep(0)
    pass_seconds(1.1)
    with pytest.raises(DeadlineExceededError, match="deadline passed"):
        await late
    assert not running.done()
    model.gate.set()
    await running


async def test_a_result_names_the_requests_of_its_batch_up_to_a_bound():
    model = Doubler()
    model.max_batch_rows = 32
    batcher = Batcher(model, EXECUTOR)
    contexts = [bytes([index]) * 24 for index in range(MAX_MEMBERS + 4)]
    results = await asyncio.gather(*(batcher.submit(request(1, trace_context=context), None) for context in contexts))
    assert {result.batch_requests for result in results} == {len(contexts)}
    assert {result.members for result in results} == {b"".join(contexts[:MAX_MEMBERS])}


async def test_nothing_is_run_at_once_past_what_waits_or_after_the_end(monkeypatch):
    monkeypatch.setattr("services.inference.execution.inline_runs.QUICK_NS", 10**12)
    model = Doubler()
    batcher = Batcher(model, EXECUTOR, inline=inline())
    await batcher.submit(request(1), None)
    (result,) = batcher.run_at_once([request(2)])
    assert result.arrays[0].item() == 4
    running = await held(model, batcher, request(1))
    assert batcher.run_at_once([request(2)]) is None  # its one instance is at work
    model.gate.set()
    await running
    await batcher.close()
    assert batcher.run_at_once([request(2)]) is None


async def test_only_what_shares_a_run_and_fits_into_it_is_run_at_once(monkeypatch):
    monkeypatch.setattr("services.inference.execution.inline_runs.QUICK_NS", 10**12)
    batcher = Batcher(Doubler(), EXECUTOR, inline=inline())
    await batcher.submit(request(1), None)
    await batcher.submit(request(1, columns=2), None)
    assert batcher.run_at_once([request(1), request(1, columns=2)]) is None
    assert batcher.run_at_once([request(1)] * 9) is None
    assert len(batcher.run_at_once([request(1)] * 8)) == 8
    assert [type(result) for result in batcher.run_at_once([request(13), request(1)])] == [
        InvalidArgumentError,
        BatchResult,
    ]


async def test_a_model_that_is_to_wait_for_more_runs_nothing_at_once(monkeypatch):
    monkeypatch.setattr("services.inference.execution.inline_runs.QUICK_NS", 10**12)
    batcher = Batcher(
        Doubler(), EXECUTOR, batching=ModelDynamicBatching(max_queue_delay_microseconds=1), inline=inline()
    )
    await batcher.submit(request(1), None)
    assert batcher.run_at_once([request(1)]) is None


async def test_a_clock_that_is_set_back_holds_up_no_request(monkeypatch):
    batcher = Batcher(Doubler(), EXECUTOR, batching=ModelDynamicBatching(max_queue_delay_microseconds=1000))
    (waits,) = await submit(batcher, request(1))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    async with asyncio.timeout(60):
        await waits


class RunClock:
    """Replaces time.monotonic_ns, which only runs and timers move: what a run takes does not depend on the machine."""

    def __init__(self, monkeypatch) -> None:
        self._now = time.monotonic_ns()
        self._lock = threading.Lock()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(time, "monotonic_ns", lambda: self._now)
        monkeypatch.setattr(loop, "call_later", lambda seconds, *call: loop.call_at(0, self._fire, seconds, *call))

    def advance(self, seconds) -> None:
        with self._lock:
            self._now += int(seconds * 1e9)

    def _fire(self, seconds, call, *arguments) -> None:
        self.advance(seconds)
        call(*arguments)


@pytest.fixture
async def clock(monkeypatch):
    return RunClock(monkeypatch)


class Slower(Doubler):
    """A row takes 1 ms, and in a run of several `factor` times as long."""

    max_batch_rows = 64

    def __init__(self, factor, clock) -> None:
        super().__init__()
        self.factor = factor
        self.clock = clock

    def run(self, inputs, outputs):
        rows = len(inputs["x"])
        self.clock.advance(rows * (0.001 if rows == 1 else 0.001 * self.factor))
        return super().run(inputs, outputs)


async def turns(model, batcher, callers):
    """The sizes of the runs that so many callers at once came to, after all of them ran alone and together."""
    await batcher.submit(request(0), None)
    for _ in range(2):
        await asyncio.gather(*await submit(batcher, *(request(value) for value in range(callers))))
    model.batches.clear()
    results = await asyncio.gather(*await submit(batcher, *(request(value) for value in range(callers))))
    assert [result.arrays[0].item() for result in results] == [value * 2 for value in range(callers)]
    return model.batches


async def test_where_a_batch_makes_rows_dearer_requests_run_one_after_the_other(clock):
    model = Slower(3, clock)
    assert await turns(model, Batcher(model, EXECUTOR), 6) == [1] * 6


async def test_where_a_batch_makes_rows_cheaper_they_run_together(clock):
    model = Slower(0.3, clock)
    assert await turns(model, Batcher(model, EXECUTOR), 6) == [6]


async def test_of_what_runs_apart_an_instance_takes_half_so_that_another_is_not_left_without(clock):
    model = Slower(3, clock)
    batcher = Batcher(model, EXECUTOR, instances=2)
    await turns(model, batcher, 6)
    model.gate.clear()
    tasks = await submit(batcher, *(request(value) for value in range(8)))
    for _ in range(2):
        await asyncio.sleep(0)
    assert batcher.waiting == 2
    model.gate.set()
    await asyncio.gather(*tasks)


async def test_what_a_slow_first_batch_taught_is_forgotten(clock):
    model = Slower(0.3, clock)
    batcher = Batcher(model, EXECUTOR)
    model.factor = 30
    await turns(model, batcher, 6)
    model.factor = 0.3
    sizes = []
    async with asyncio.timeout(60):
        while 6 not in sizes[-PROBE:]:
            await asyncio.gather(*await submit(batcher, *(request(value) for value in range(6))))
            sizes += model.batches
            model.batches.clear()
        # From then on it runs them together, but for one now and then that shows what it takes alone.
        await asyncio.gather(*await submit(batcher, *(request(value) for value in range(6))))
    assert sum(model.batches) == 6
    assert len(model.batches) <= 2


async def test_what_a_row_takes_alone_is_learnt_where_requests_only_come_together(clock):
    model = Slower(3, clock)
    batcher = Batcher(model, EXECUTOR)
    async with asyncio.timeout(60):
        while model.batches[-6:] != [1] * 6:
            await asyncio.gather(*await submit(batcher, *(request(value) for value in range(6))))


async def test_of_requests_that_run_apart_those_that_nobody_waits_for_do_not_run(clock):
    model = Slower(3, clock)
    batcher = Batcher(model, EXECUTOR)
    await turns(model, batcher, 6)
    model.batches.clear()
    model.gate.clear()
    waiting = [batcher.enqueue(request(value), None) for value in range(2)]
    deadline = time.monotonic() + 0.02
    waiting += [batcher.enqueue(request(2), deadline), batcher.enqueue(request(3), None)]
    waiting += [batcher.enqueue(request(value), None) for value in (4, 5, 6)]
    while not waiting[0].begun:
        await asyncio.sleep(0)
    assert batcher.waiting <= 3
    assert batcher.withdraw(waiting[3])
    assert not batcher.withdraw(waiting[0])
    with pytest.raises(DeadlineExceededError):
        await waiting[2].future  # on time, though the first of them still runs
    assert not waiting[0].future.done()
    model.gate.set()
    results = await asyncio.gather(*(one.future for one in waiting), return_exceptions=True)
    assert [isinstance(result, BatchResult) for result in results] == [True, True, False, False, True, True, True]
    assert isinstance(results[2], DeadlineExceededError)
    assert sum(model.batches) == 5
