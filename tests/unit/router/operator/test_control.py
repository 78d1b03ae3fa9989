from types import SimpleNamespace

import pytest
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import EVERYTHING, MODELS, tenant_scope
from router.balancing.catalog import Catalog
from router.balancing.member import Listing, Member
from router.operator import control as module
from router.operator.control import FleetControl
from router.transport.worker_load import WorkerLoad
from services.runtime.errors import NotFoundError, UnavailableError


class Fleet:
    def __init__(self, described):
        self.members = ()
        self.described = described
        self.asked = 0

    async def describe_all(self):
        self.asked += 1
        return self.described


@pytest.mark.parametrize(("news", "asked"), [({MODELS}, 1), ({EVERYTHING}, 1), ({tenant_scope("acme")}, 0), (set(), 0)])
async def test_workers_are_asked_again_where_others_may_have_loaded_models(news, asked):
    fleet = Fleet(described=True)
    assert await FleetControl(fleet, None, None, None).hear(news)
    assert fleet.asked == asked


async def test_a_change_of_models_is_not_confirmed_while_a_busy_worker_has_not_described_itself():
    control = FleetControl(Fleet(described=False), None, None, None)
    assert not await control.hear({MODELS})


class Worker:
    """A link to a worker that keeps what it is asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def call(self, method, request, seconds):
        self.asked.append((method.rpartition("/")[2], request))
        return self.answer


class Workers:
    """A fleet; `learned` are decisions that a worker tells when it describes itself again."""

    def __init__(self, *members, learned=()):
        self.members = members
        self.poll_seconds = 0.5
        self.view = SimpleNamespace(catalog=Catalog([[]]))
        self._learned = learned

    async def describe(self, member):
        member.decisions += tuple(self._learned)

    async def describe_all(self):
        return True


def decided(at):
    return inference_pb2.ModelDecision(model="m", decided_unix_ns=at, fleet=True)


def worker(address, at, answer=b""):
    made = Member(Listing(address), Worker(answer), WorkerLoad())
    made.reason = ""
    made.models = (inference_pb2.ModelVersion(name="m", version="1"),)
    made.decisions = (decided(at),)
    return made


def control_of(*members, learned=()):
    return FleetControl(Workers(*members, learned=learned), None, None, told)


async def test_a_load_is_later_than_one_that_another_router_made_with_a_clock_ahead():
    made, ahead = worker("a:1", 1), 1 << 61
    control = control_of(made, learned=[decided(ahead)])
    await control._load(v2.RepositoryModelLoadRequest(model_name="m"), None)
    ((method, asked),) = made.link.asked
    request = v2.RepositoryModelLoadRequest.FromString(asked)
    assert method == "RepositoryModelLoad"
    assert request.parameters["ringmesh_decided_ns"].int64_param > ahead


async def test_an_unload_can_be_repeated_for_a_worker_that_failed_to_apply_it():
    made = worker("a:1", 1)
    await control_of(made)._unload(v2.RepositoryModelUnloadRequest(model_name="m"), None)
    assert [method for method, _ in made.link.asked] == ["RepositoryModelUnload"]
    with pytest.raises(NotFoundError):
        await control_of(made)._unload(v2.RepositoryModelUnloadRequest(model_name="n"), None)


async def test_the_index_does_not_list_as_ready_what_only_a_worker_without_the_last_decision_has():
    line = v2.RepositoryIndexResponse.ModelIndex(name="m", version="1", state="READY")
    has_it = v2.RepositoryIndexResponse(models=[line]).SerializeToString()
    has_none = v2.RepositoryIndexResponse().SerializeToString()
    control = control_of(worker("a:1", 1, has_it), worker("b:1", 2, has_none))
    index = await control._index(v2.RepositoryIndexRequest(), None)
    assert [(line.state, line.reason) for line in index.models] == [
        ("UNAVAILABLE", "a:1: the fleet has replaced or unloaded it, and this worker has yet to do so")
    ]
    ready = await control._index(v2.RepositoryIndexRequest(ready=True), None)
    assert not ready.models


async def unavailable():
    raise UnavailableError("Redis is away")


async def told():
    pass


@pytest.mark.parametrize(("announce", "waits"), [(told, 0), (unavailable, 1)])
async def test_a_load_returns_when_other_routers_know_it_if_need_be_by_their_polls(announce, waits, monkeypatch):
    async def sleep(seconds):
        assert seconds > 1.1 * control._fleet.poll_seconds
        slept.append(seconds)

    slept = []
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    control = FleetControl(Workers(worker("w:1", 1)), None, None, announce)
    await control._load(v2.RepositoryModelLoadRequest(model_name="m"), None)
    assert len(slept) == waits
