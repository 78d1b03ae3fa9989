"""When a worker takes the decisions that routers send it."""

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.api.control import ModelControl
from services.runtime.errors import InvalidArgumentError


class Store:
    """Keeps the times of the decisions that it was given."""

    def __init__(self):
        self.decided = []

    async def load(self, name, overrides, *, pardon, decided_ns):
        self.decided.append(decided_ns)


def load(decided_ns):
    request = v2.RepositoryModelLoadRequest(model_name="m")
    request.parameters["ringmesh_decided_ns"].int64_param = decided_ns
    return request


async def test_a_decision_after_one_of_a_clock_that_is_years_ahead_is_taken():
    store = Store()
    years_ahead = 4_000_000_000_000_000_000
    await ModelControl(store)._load(load(years_ahead), None)
    assert store.decided == [years_ahead]


@pytest.mark.parametrize("decided_ns", [-(1 << 63), -1, 0, (1 << 62) + 1, (1 << 63) - 1])
async def test_a_decision_after_which_none_could_come_is_refused(decided_ns):
    store = Store()
    with pytest.raises(InvalidArgumentError, match=f"ringmesh_decided_ns is {decided_ns}, but must be from 1 to"):
        await ModelControl(store)._load(load(decided_ns), None)
    assert store.decided == []
