"""Five times what the fleet can compute: it goes on computing, and says no to the rest at once."""

import asyncio
import os
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.models import slow
from tests.system.test_cache import INFER, fresh

pytestmark = pytest.mark.proof
# So many as no worker refuses: eight each.
CALLERS = 16


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A model that takes some 20 ms and does not gain from batches."""
    repository = tmp_path_factory.mktemp("overload-models")
    slow(repository, trips=60)
    return repository


@pytest.fixture
def cores():
    """One for the workers and one for the rest, as hosts of their own have them. This process is with the rest."""
    every = sorted(os.sched_getaffinity(0))
    threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
    for thread in threads:
        os.sched_setaffinity(thread, {every[-1]})
    yield every[0], every[-1]
    for thread in threads:
        os.sched_setaffinity(thread, every)


@pytest.fixture
def router(start_router, start_worker, cores):
    theirs, ours = (("taskset", "-c", str(core)) for core in cores)
    workers = [start_worker(name, within=theirs) for name in ("worker-a", "worker-b")]
    return start_router([worker.address for worker in workers], None, within=ours).address


class Answers:
    """When each call ended, how long it took, and its status."""

    def __init__(self, channel):
        self._method = channel.unary_unary(INFER)
        self._ends = []
        self.hints = []

    async def ask(self):
        begin = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            await self._method(fresh("slow").SerializeToString(), timeout=20)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            (detail,) = rpc_status.from_call(error).details
            retry = error_details_pb2.RetryInfo()
            assert detail.Unpack(retry)
            self.hints.append(retry.retry_delay.ToTimedelta().total_seconds())
        end = time.monotonic()
        self._ends.append((end, (end - begin) * 1e3, code))

    def of(self, code, since, until):
        """Milliseconds taken by calls that ended with this status in this time, in order."""
        return sorted(took for end, took, ended in self._ends if ended == code and since <= end <= until)

    def codes(self):
        return {code for *_, code in self._ends}


def told(times):
    p = lambda q: times[int(q * (len(times) - 1))]  # noqa: E731
    return f"p50 {p(0.5):.1f} p99 {p(0.99):.1f} ms"


async def test_goodput_stays_at_capacity_and_the_rest_is_refused_with_a_time_to_come_back(router):
    ok, exhausted = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
    async with grpc.aio.insecure_channel(router) as channel:
        lone, calm = Answers(channel), Answers(channel)
        for _ in range(20):
            await lone.ask()
        end = time.monotonic() + 5

        async def caller():
            while time.monotonic() < end:
                await calm.ask()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        before = calm.of(ok, end - 4, end)
        capacity = len(before) / 4
        assert calm.codes() == {ok}

        overload = Answers(channel)
        due = begin = time.monotonic()
        calls = set()
        while time.monotonic() < begin + 8:
            task = asyncio.create_task(overload.ask())
            calls.add(task)
            task.add_done_callback(calls.discard)
            due += 1 / (5 * capacity)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        since, stop = begin + 3, time.monotonic()
        answered, refused = (overload.of(code, since, stop) for code in (ok, exhausted))
        await asyncio.gather(*calls)
    goodput = len(answered) / (stop - since)
    print(
        f"\none caller: {told(lone.of(ok, 0, end))}; {CALLERS}: {capacity:.0f}/s at {told(before)}; "
        f"5 times as many requests: {goodput:.0f}/s answered "
        f"({goodput / capacity:.2f}) at {told(answered)}; "
        f"{len(refused) / (stop - since):.0f}/s refused at {told(refused)}"
    )
    assert overload.codes() == {ok, exhausted}
    assert goodput >= 0.9 * capacity
    assert len(refused) > 2 * len(answered)
    assert all(0 < seconds < 1 for seconds in overload.hints)


async def test_callers_who_wait_for_the_answers_of_a_slow_model_are_not_refused(start_router, start_worker, tmp_path):
    slow(tmp_path, trips=1000)
    workers = [start_worker(name, models=tmp_path) for name in ("worker-a", "worker-b")]
    router = start_router([worker.address for worker in workers], None).address
    async with grpc.aio.insecure_channel(router) as channel:
        answers = Answers(channel)

        async def caller():
            for _ in range(2):
                await answers.ask()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    assert answers.codes() == {grpc.StatusCode.OK}
