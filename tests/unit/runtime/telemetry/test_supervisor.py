"""Work in the background: begun again when it fails, counted, told once, and ended with the process."""

import asyncio
import logging

import pytest

from services.runtime.telemetry.supervisor import FAILING, FAILURES, RUNNING, Supervisor


class Pauses:
    """Waits for nothing, and remembers for how long it was asked to."""

    def __init__(self):
        self.asked = []

    async def __call__(self, seconds):
        self.asked.append(seconds)
        await asyncio.sleep(0)


def samples(supervisor, family):
    return {sample.labels: sample.value for sample in supervisor.samples() if sample.family is family}


async def test_what_fails_is_begun_again_after_pauses_that_grow_and_are_bounded():
    pauses = Pauses()
    supervisor = Supervisor(pauses)
    runs = []

    async def work():
        runs.append(None)
        if len(runs) <= 20:
            raise ValueError("no")

    await supervisor.start("work", work)
    assert len(runs) == 21
    assert pauses.asked[0] < 0.2
    assert pauses.asked[5] > pauses.asked[0]
    assert 5 <= pauses.asked[-1] <= 15
    assert samples(supervisor, FAILURES) == {("work",): 20}
    assert samples(supervisor, FAILING) == {("work", "ValueError: no"): 1}
    assert samples(supervisor, RUNNING) == {("work",): 0}


async def test_each_reason_is_logged_once(caplog):
    supervisor = Supervisor(Pauses())
    reasons = ["a", "a", "b", "a"]

    async def work():
        if reasons:
            raise ValueError(reasons.pop())

    with caplog.at_level(logging.ERROR):
        await supervisor.start("work", work)
    assert [record.exc_info[1].args for record in caplog.records] == [("a",), ("b",)]


async def test_what_is_done_once_fails_for_itself_alone():
    supervisor = Supervisor()

    async def work():
        raise ValueError("no")

    await supervisor.once("work", work)
    assert samples(supervisor, FAILURES) == {("work",): 1}


async def test_what_runs_is_told_and_all_of_it_is_ended_and_waited_for():
    supervisor = Supervisor()
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(None)

    tasks = [supervisor.start("work", work), supervisor.start("work", work), supervisor.once("once", work)]
    await asyncio.sleep(0)
    assert samples(supervisor, RUNNING) == {("work",): 2, ("once",): 1}
    await supervisor.close()
    assert len(ended) == 3
    assert all(task.cancelled() for task in tasks)
    assert samples(supervisor, RUNNING) == {("work",): 0, ("once",): 0}


@pytest.mark.filterwarnings("error")
async def test_what_is_ended_before_it_began_leaves_nothing_behind():
    supervisor = Supervisor()

    async def work():
        raise AssertionError

    supervisor.once("work", work)
    supervisor.start("work", work)
    await supervisor.close()
    assert samples(supervisor, FAILURES) == {}


async def test_what_keeps_its_cancellation_to_itself_is_cancelled_again():
    supervisor = Supervisor()
    kept = []

    async def work():
        while len(kept) < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                kept.append(None)
        await asyncio.Event().wait()

    task = supervisor.start("work", work)
    await asyncio.sleep(0)
    await supervisor.close()
    assert (len(kept), task.cancelled()) == (2, True)
