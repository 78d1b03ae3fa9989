"""Five times what the fleet can compute: it goes on computing, and says no to the rest at once."""

import asyncio
import time

import grpc
import pytest

from tests.models import slow
from tests.system.test_cache import INFER, fresh

pytestmark = pytest.mark.proof


@pytest.fixture(scope="session", params=["native"])
def engine(request):
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A model that takes some 10 ms and does not gain from batches."""
    repository = tmp_path_factory.mktemp("overload-models")
    slow(repository, trips=30)
    return repository


@pytest.fixture
def router(start_router, start_worker):
    workers = [start_worker(name) for name in ("worker-a", "worker-b")]
    return start_router([worker.address for worker in workers], None, queue_seconds=0.05).address


class Answers:
    """When each call ended, how long it took, and its status."""

    def __init__(self, channel):
        self._method = channel.unary_unary(INFER)
        self._ends = []

    async def ask(self):
        begin = time.monotonic()
        try:
            await self._method(fresh("slow").SerializeToString(), timeout=20)
            code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
        end = time.monotonic()
        self._ends.append((end, (end - begin) * 1e3, code))

    def of(self, code, since):
        """Milliseconds taken by calls that ended with this status since then, in order."""
        return sorted(took for end, took, ended in self._ends if ended == code and end >= since)

    def codes(self):
        return {code for *_, code in self._ends}


async def test_goodput_stays_at_capacity_and_the_rest_is_refused_at_once(router):
    async with grpc.aio.insecure_channel(router) as channel:
        calm = Answers(channel)
        end = time.monotonic() + 4

        async def caller():
            while time.monotonic() < end:
                await calm.ask()

        await asyncio.gather(*(caller() for _ in range(6)))
        alone = calm.of(grpc.StatusCode.OK, end - 3)
        capacity = len(alone) / 3

        overload = Answers(channel)
        due = begin = time.monotonic()
        calls = set()
        while (now := time.monotonic()) < begin + 8:
            task = asyncio.create_task(overload.ask())
            calls.add(task)
            task.add_done_callback(calls.discard)
            due += 1 / (5 * capacity)
            await asyncio.sleep(max(0.0, due - now))
        stop = time.monotonic()
        answered = overload.of(grpc.StatusCode.OK, begin + 3)
        goodput = sum(
            1 for end, _, code in overload._ends if code == grpc.StatusCode.OK and begin + 3 <= end <= stop
        ) / (stop - begin - 3)
        refused = overload.of(grpc.StatusCode.RESOURCE_EXHAUSTED, begin + 3)
        await asyncio.gather(*calls)
    p = lambda times, q: times[int(q * (len(times) - 1))]  # noqa: E731
    seconds = stop - begin - 3
    tell = lambda times: f"p50 {p(times, 0.5):.0f} p99 {p(times, 0.99):.0f} ms"  # noqa: E731
    print(
        f"\ncapacity {capacity:.0f}/s at {tell(alone)}; offered 5 times as much, goodput {goodput:.0f}/s "
        f"({goodput / capacity:.2f}) at {tell(answered)}; {len(refused) / seconds:.0f}/s refused within {tell(refused)}"
    )
    assert overload.codes() == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert goodput > 0.7 * capacity
    assert len(refused) > 2 * len(answered)
    # Those refused do not wait for what those answered wait for.
    assert p(refused, 0.5) < p(answered, 0.5)
