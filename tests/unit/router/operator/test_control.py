from types import SimpleNamespace

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import EVERYTHING, MODELS, tenant_scope
from router.membership.fleet import POLL_SECONDS
from router.operator import control as module
from router.operator.control import FleetControl
from services.runtime.errors import UnavailableError


class Fleet:
    def __init__(self, described):
        self.view = SimpleNamespace(members={})
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


async def unavailable():
    raise UnavailableError("Redis is away")


async def told():
    return True


async def not_told():
    return False


@pytest.mark.parametrize(("announce", "waits"), [(told, 0), (not_told, 1), (unavailable, 1)])
async def test_a_load_returns_when_other_routers_know_it_if_need_be_by_their_polls(announce, waits, monkeypatch):
    async def call(method, request, seconds):
        return b""

    async def sleep(seconds):
        assert seconds > 1.1 * POLL_SECONDS
        slept.append(seconds)

    slept = []
    fleet = Fleet(described=True)
    worker = SimpleNamespace(healthy=True, decisions=(), link=SimpleNamespace(call=call))
    fleet.view = SimpleNamespace(members={"w:1": worker})
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    await FleetControl(fleet, None, None, announce)._load(v2.RepositoryModelLoadRequest(model_name="m"), None)
    assert len(slept) == waits
