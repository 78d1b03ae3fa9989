"""Five times what the fleet can compute: it goes on computing, and says no to the rest at once."""

import asyncio
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.models import slow
from tests.system import processes
from tests.system.test_cache import INFER, fresh

pytestmark = [pytest.mark.proof, pytest.mark.alone]
# So many as no worker refuses: eight each.
CALLERS = 16
ROUNDS = 3
AS_SHIPPED = dict.fromkeys(processes.STEADY)


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
        with suppress(ProcessLookupError):  # a thread that has ended meanwhile
            os.sched_setaffinity(thread, every)


@pytest.fixture(params=["alone", "redis"])
def router(request, start_router, start_worker, cores):
    """Where there is a Redis it is asked before a request is refused."""
    redis_url = request.getfixturevalue("valkey").connection_url if request.param == "redis" else None
    theirs, ours = (("taskset", "-c", str(core)) for core in cores)
    workers = [start_worker(name, within=theirs) for name in ("worker-a", "worker-b")]
    return start_router([worker.address for worker in workers], redis_url, within=ours, **AS_SHIPPED).address


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
            await self._method(fresh("slow").SerializeToString(), timeout=60)
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


async def test_goodput_stays_near_capacity_and_the_rest_is_refused_with_a_time_to_come_back(router):
    """In rounds of both, since a machine is not the same for long; docs/performance.md has a quiet run's figures."""
    ok, exhausted = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
    ratios = []
    async with grpc.aio.insecure_channel(router) as channel:
        for _ in range(ROUNDS):
            calm, overload = Answers(channel), Answers(channel)
            end = time.monotonic() + 2.5

            async def caller(calm=calm, end=end):
                while time.monotonic() < end:
                    await calm.ask()

            await asyncio.gather(*(caller() for _ in range(CALLERS)))
            before = calm.of(ok, end - 2, end)
            capacity = len(before) / 2
            assert calm.codes() == {ok}

            due = begin = time.monotonic()
            calls = set()
            while time.monotonic() < begin + 4:
                task = asyncio.create_task(overload.ask())
                calls.add(task)
                task.add_done_callback(calls.discard)
                due += 1 / (5 * capacity)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            since, stop = begin + 1.5, time.monotonic()
            answered, refused = (overload.of(code, since, stop) for code in (ok, exhausted))
            await asyncio.gather(*calls)
            ratios.append(len(answered) / (stop - since) / capacity)
            print(
                f"\n{CALLERS} callers: {capacity:.0f}/s at {told(before)}; 5 times as many: {ratios[-1]:.2f} of it "
                f"answered at {told(answered)}; {len(refused) / (stop - since):.0f}/s refused at {told(refused)}"
            )
            assert overload.codes() == {ok, exhausted}
            assert len(refused) > 2 * len(answered)
            assert all(0 < seconds < 1 for seconds in overload.hints)
    # Without admission it would go to nothing: all answers would come late.
    assert statistics.median(ratios) > 0.5


async def test_callers_who_wait_for_the_answers_of_a_slow_model_are_not_refused(start_router, start_worker, tmp_path):
    slow(tmp_path, trips=1000)
    workers = [start_worker(name, models=tmp_path) for name in ("worker-a", "worker-b")]
    router = start_router([worker.address for worker in workers], None, **AS_SHIPPED).address
    async with grpc.aio.insecure_channel(router) as channel:
        answers = Answers(channel)

        async def caller():
            for _ in range(2):
                await answers.ask()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    assert answers.codes() == {grpc.StatusCode.OK}
