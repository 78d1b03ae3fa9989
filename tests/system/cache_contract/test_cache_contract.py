"""The contract, kept by Ringmesh."""

import grpc
import pytest

from tests.system import processes
from tests.system.cache_contract.cases import CASES
from tests.system.cache_contract.servers import NotOfferedError, Server, lay_out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    lay_out(folder, "ringmesh")
    # The audit would find that the models do not repeat themselves.
    worker = processes.start("services.inference", models=folder, worker_id="contract", threads=1)
    router = processes.start("router", workers=worker.address, audit_share=0)
    with grpc.insecure_channel(router.address) as channel:
        yield Server(channel, "ringmesh", folder)
    processes.stop(router)
    processes.stop(worker)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.promise}: {case.statement}")
def test_the_cache_keeps_its_contract(case, server):
    try:
        case.check(server)
    except NotOfferedError as lacking:
        pytest.fail(f"Ringmesh offers all of it: {lacking}")
