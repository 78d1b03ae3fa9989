from types import SimpleNamespace

import pytest

from cache.keys.epochs import EVERYTHING, MODELS, tenant_scope
from router.operator.control import FleetControl


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
