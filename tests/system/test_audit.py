"""The cache audit on running processes: a model that should never have been cached is found out."""

import asyncio

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from tests.models import identity, random
from tests.system import processes
from tests.system.test_cache import fresh, infer


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    random(folder)
    (folder / "random" / "config.pbtxt").write_text("response_cache { enable: true }")
    identity(folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def router(repository):
    worker = processes.start("services.inference", models=repository, worker_id="audited", threads=1)
    started = processes.start("router", workers=worker.address, audit_share=1)
    yield started
    processes.stop(started, worker)


async def test_a_random_model_whose_analysis_was_overruled_leaves_the_cache_and_says_so(router):
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = v2_grpc.GRPCInferenceServiceStub(channel)
        steady = fresh("identity_fp32")
        request, outcomes = fresh("random"), []
        async with asyncio.timeout(120):
            while "bypass" not in outcomes:
                outcomes.append((await infer(channel, request))[1]["ringmesh-cache"])
                await infer(channel, steady)
                await asyncio.sleep(0.01)
        assert outcomes[:2] == ["miss", "hit-local"]
        index = await stub.RepositoryIndex(v2.RepositoryIndexRequest())
        reasons = {line.name: line.reason for line in index.models}
        assert (
            "not cached: 3 of 3 answers that were computed again for the audit came out different" in reasons["random"]
        )
        assert reasons["identity_fp32"] == "batched: rows are proven independent"
        config = (await stub.ModelConfig(v2.ModelConfigRequest(name="random"))).config
        assert config.parameters["ringmesh_cached"].string_value.startswith("no: 3 of 3")
        told = await router_pb2_grpc.RouterServiceStub(channel).Explain(router_pb2.ExplainRequest(request=request))
        assert told.uncached_reason.startswith("3 of 3")
        # Other files are trusted until they are found out themselves.
        load = v2.RepositoryModelLoadRequest(model_name="random")
        load.parameters["config"].string_param = '{"responseCache": {"enable": true}, "maxBatchSize": 4}'
        await stub.RepositoryModelLoad(load)
        assert (await infer(channel, request))[1]["ringmesh-cache"] == "miss"
        assert (await infer(channel, steady))[1]["ringmesh-cache"] == "hit-local"
