"""Whom a fleet passes over: a worker that is gone or hangs, and none that is busy."""

import asyncio

import pytest
from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Listing
from router.membership import fleet
from router.membership.events import Event
from router.membership.fleet import Fleet
from router.operator.service import OperatorService
from router.transport.worker_client import WorkerBusyError, WorkerUnreachableError
from services.runtime.errors import NotFoundError, UnavailableError
from tests.unit.clock import Clock
from tests.unit.router.transport.test_worker_client import Worker


class Link:
    """To a worker that answers what `answers` has, one answer for each call of `describe`."""

    def __init__(self):
        self.answers = asyncio.Queue()
        self.asked = asyncio.Event()

    async def describe(self, seconds, known_version):
        self.asked.set()
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def give_up(self):
        pass

    def forget_queues(self, digests):
        pass

    def close(self):
        pass


def described(version, digest, decided_ns=0):
    held = inference_pb2.ModelVersion(name="m", version="1", digest=digest * 16)
    decision = inference_pb2.ModelDecision(model="m", decided_unix_ns=decided_ns, fleet=True)
    return inference_pb2.DescribeResponse(
        worker_id="w",
        accepting=True,
        version=version,
        models=[held],
        decisions=[decision] if decided_ns else [],
    )


def fleet_of(*addresses):
    """A fleet, and a link to each of its workers."""
    made = Fleet([Listing(address) for address in addresses], lambda ready: None, clock=Clock())
    links = []
    for address in addresses:
        made.view.members[address].link.close()
        made.view.members[address].link = Link()
        links.append(made.view.members[address].link)
    return made, *links


async def fleet_of_one():
    """A fleet, its worker, which has described itself, and the link to it."""
    made, link = fleet_of("a:1")
    (member,) = made.view.members.values()
    link.answers.put_nowait(described(1, b"1"))
    await made.describe(member)
    return made, member, link


@pytest.fixture
async def worker(tmp_path):
    made = Worker(tmp_path)
    made.says.accepting = True
    await made.server.start()
    yield made
    await made.server.stop(0)


async def test_a_worker_that_is_busy_keeps_its_requests_until_it_hangs(worker, monkeypatch):
    clock = Clock()
    made = Fleet([Listing(worker.address)], lambda ready: None, clock=clock)
    (member,) = made.view.members.values()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 20.0)
    await made.describe(member)
    assert member.healthy
    worker.describes.clear()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 0.2)
    await made.describe(member)
    clock.now = fleet.MOST_BUSY_SECONDS - 1
    await made.describe(member)
    assert member.healthy
    member.load.reports += 1  # an answer came: it is busy from now on, and not since then
    clock.now = fleet.MOST_BUSY_SECONDS + 1
    await made.describe(member)
    assert member.healthy
    clock.now += fleet.MOST_BUSY_SECONDS
    await made.describe(member)
    assert not member.healthy
    worker.describes.set()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 20.0)
    await made.describe(member)
    assert member.healthy
    made.close()


async def test_a_worker_that_is_gone_is_passed_over_at_once(worker):
    made = Fleet([Listing(worker.address)], lambda ready: None, clock=Clock())
    (member,) = made.view.members.values()
    await made.describe(member)
    assert member.healthy
    await worker.server.stop(0)
    await made.describe(member)
    assert not member.healthy
    made.close()


async def test_a_description_from_before_a_change_of_models_is_asked_for_again():
    made, member, link = await fleet_of_one()
    link.asked.clear()
    polling = asyncio.create_task(made.describe(member))
    await link.asked.wait()
    everything = asyncio.create_task(made.describe_all())
    await asyncio.sleep(0)
    for answer in (described(1, b"1"), described(2, b"2"), described(2, b"2")):
        link.answers.put_nowait(answer)
    assert await polling
    assert await everything
    assert link.answers.empty()  # all three were asked for
    assert made.view.catalog.find("m", "").digest == b"2" * 16
    made.close()


async def test_a_busy_worker_has_not_described_its_models():
    made, member, link = await fleet_of_one()
    link.answers.put_nowait(WorkerBusyError("no answer"))
    assert not await made.describe_all()
    assert member.healthy
    link.answers.put_nowait(described(2, b"2"))
    assert await made.describe_all()
    # One that goes on answering requests, but never says what it holds, gets none in the end.
    for seconds in (0, fleet.MOST_BUSY_SECONDS):
        made._clock.now += seconds
        member.load.reports += 1
        link.answers.put_nowait(WorkerBusyError("no answer"))
        assert await made.describe_all() == bool(seconds)
    assert not member.healthy
    made.close()


async def test_no_model_is_known_after_a_change_of_which_no_worker_can_tell():
    made, member, link = await fleet_of_one()
    link.answers.put_nowait(WorkerUnreachableError("gone"))
    await made.describe(member)
    assert made.view.catalog.find("m", "").digest == b"1" * 16  # nothing has changed: cached answers are right
    assert await made.describe_all()
    with pytest.raises(UnavailableError):
        made.view.catalog.find("m", "")
    made.close()


def fleet_with_a_missed_load():
    """A fleet, its workers, which are about to describe themselves, and the links to them. The first worker has an
    older decision on the model than the second."""
    made, first, second = fleet_of("a:1", "b:1")
    before, after = made.view.members.values()
    first.answers.put_nowait(described(1, b"1", decided_ns=1))
    second.answers.put_nowait(described(1, b"2", decided_ns=2))
    return made, before, after, first, second


def leave(made, member):
    """Removes a worker, as when no source lists it any more."""
    made._polls[member.address] = asyncio.create_task(asyncio.sleep(0))
    made._leave(made._members.pop(member.address))


async def test_the_models_of_a_worker_that_missed_a_decision_of_the_fleet_are_not_used():
    made, before, after, first, _ = fleet_with_a_missed_load()
    await made.describe(before)
    assert made.view.catalog.find("m", "").digest == b"1" * 16
    await made.describe(after)
    assert made.view.catalog.find("m", "").digest == b"2" * 16
    assert [bool(each.held) for each in (before, after)] == [False, True]
    first.answers.put_nowait(described(2, b"2", decided_ns=2))
    await made.describe(before)
    assert before.held == after.held
    made.close()


async def test_an_older_worker_does_not_bring_back_what_a_lost_worker_had_replaced():
    made, before, after, _, second = fleet_with_a_missed_load()
    await made.describe(before)
    await made.describe(after)
    second.answers.put_nowait(WorkerUnreachableError("gone"))
    await made.describe(after)
    with pytest.raises(UnavailableError, match="no worker that holds model 'm' can be reached"):
        made.view.catalog.find("m", "")
    assert before.healthy
    assert not before.held
    leave(made, after)
    assert made.view.catalog.find("m", "").digest == b"1" * 16
    made.close()


async def test_a_model_whose_only_worker_is_lost_is_unavailable_and_not_unknown():
    made, first, second = fleet_of("a:1", "b:1")
    holder, other = made.view.members.values()
    first.answers.put_nowait(described(1, b"1"))
    second.answers.put_nowait(inference_pb2.DescribeResponse(worker_id="other", accepting=True, version=1))
    await made.describe(holder)
    await made.describe(other)
    first.answers.put_nowait(WorkerUnreachableError("gone"))
    await made.describe(holder)
    for version in ("", "1"):
        with pytest.raises(UnavailableError, match="no worker that holds model 'm' can be reached"):
            made.view.catalog.find("m", version)
    with pytest.raises(NotFoundError):
        made.view.catalog.find("m", "2")
    made.close()


async def test_a_worker_that_was_busy_after_an_earlier_change_has_its_time_again_after_the_next():
    made, member, link = await fleet_of_one()
    link.answers.put_nowait(WorkerBusyError("no answer"))
    assert not await made.describe_all()
    link.answers.put_nowait(described(2, b"2"))
    await made.describe(member)
    made._clock.now += 3600
    link.answers.put_nowait(WorkerBusyError("no answer"))
    assert not await made.describe_all()
    assert member.healthy
    made.close()


async def test_an_ensemble_stays_known_while_a_worker_has_an_old_step_of_it():
    made, first, second = fleet_of("a:1", "b:1")
    ahead, behind = made.view.members.values()
    whole = inference_pb2.ModelVersion(name="e", version="1", digest=b"e" * 16)
    config = whole.ensemble.config
    config.input.add(name="x")
    config.output.add(name="y")
    step = config.ensemble_scheduling.step.add(model_name="m", model_version=-1)
    step.input_map["x"], step.output_map["y"] = "x", "y"
    old = described(1, b"1")
    old.models.append(whole)
    first.answers.put_nowait(described(1, b"2", decided_ns=2))
    second.answers.put_nowait(old)
    await made.describe(ahead)
    await made.describe(behind)
    assert made.view.catalog.find("e", "").step_digests == {b"2" * 16}
    assert not behind.held
    made.close()


async def test_a_description_that_comes_after_its_worker_has_left_changes_nothing():
    made, member, link = await fleet_of_one()
    link.asked.clear()
    describing = asyncio.create_task(made.describe(member))
    await link.asked.wait()
    leave(made, member)
    link.answers.put_nowait(described(2, b"2"))
    assert await describing
    assert (member.reason, member.version) == ("left the fleet", 1)
    made.close()


async def test_a_watch_begins_with_workers_that_are_not_in_the_ring_yet():
    made, _ = fleet_of("a:1")
    made._reported("discovery", [Listing("b:1")])
    assert list(made.view.members) == ["a:1"]
    watch = OperatorService(made, None, None)._watch(b"", None)
    told = [await anext(watch)]
    made.close()
    told += [event async for event in watch]
    events = [Event.FromString(event) for event in told]
    assert [event.address for event in events if event.kind == Event.KIND_JOINED] == ["a:1", "b:1"]


@pytest.mark.parametrize(
    ("providers", "worker_type"),
    [
        ([], "cpu"),
        (["CPUExecutionProvider", "OpenVINOExecutionProvider"], "cpu"),
        (["CPUExecutionProvider", "CUDAExecutionProvider"], "gpu"),
    ],
)
async def test_a_worker_that_runs_a_model_on_a_gpu_is_of_that_type(providers, worker_type):
    made, member, link = await fleet_of_one()
    answer = described(2, b"1")
    models = [
        inference_pb2.ModelVersion(name=f"m{place}", version="1", digest=b"%d" % place * 16, provider=provider)
        for place, provider in enumerate(providers)
    ]
    del answer.models[:]
    answer.models.extend(models)
    link.answers.put_nowait(answer)
    await made.describe(member)
    assert member.worker_type == worker_type
    made.close()
