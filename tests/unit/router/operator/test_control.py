from types import SimpleNamespace

import pytest

from cache.keys.epochs import EVERYTHING, MODELS, tenant_scope
from router.operator.control import FleetControl


@pytest.mark.parametrize(
    ("news", "asked"),
    [({MODELS}, ["healthy"]), ({EVERYTHING}, ["healthy"]), ({tenant_scope("acme")}, []), (set(), [])],
)
async def test_workers_are_asked_again_where_others_may_have_loaded_models(news, asked):
    described = []

    async def describe(member):
        described.append(member.name)

    members = {name: SimpleNamespace(name=name, healthy=name == "healthy") for name in ("healthy", "lost")}
    fleet = SimpleNamespace(view=SimpleNamespace(members=members), describe=describe)
    await FleetControl(fleet, None, None, None).hear(news)
    assert described == asked
