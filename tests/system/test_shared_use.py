"""Redis is used only if that pays: the commands that it gets for cheap and for expensive models."""

import asyncio

import grpc
import pytest
from redis import Redis
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from tests import models
from tests.ports import free_port
from tests.system.test_cache import fresh, infer
from tests.system.test_metrics import scrape, value
from tests.system.test_tracing import SERVER, complete, traced

POLICIES = ("always", "never")
LEARNING = 300


def asked(model):
    request = fresh("mlp" if model != "expensive" else "slow")
    request.model_name = model
    return request


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("cheap", *POLICIES):
        models.mlp(folder, name=name)
    for policy in POLICIES:
        parameter = f'parameters {{ key: "ringmesh_shared_tier" value {{ string_value: "{policy}" }} }}'
        (folder / policy / "config.pbtxt").write_text(parameter)
    models.slow(folder, 60, name="expensive")
    return folder


@pytest.fixture
def worker(start_worker, repository):
    return start_worker("worker", models=repository).address


@pytest.fixture
async def channel(start_router, worker, valkey):
    async with grpc.aio.insecure_channel(
        start_router([worker], valkey.connection_url, audit_share=0).address
    ) as channel:
        yield channel


class Commands:
    """Counts the look-ups and writes of answers that Redis got since the last call."""

    def __init__(self, url):
        self._redis = Redis.from_url(url)
        self._seen = (0, 0)

    def __call__(self):
        stats = self._redis.info("commandstats")
        seen = tuple(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("get", "set"))
        before, self._seen = self._seen, seen
        return tuple(now - then for now, then in zip(seen, before, strict=True))


async def outcomes(channel, requests):
    return [(await infer(channel, request))[1]["ringmesh-cache"] for request in requests]


async def test_a_cheap_model_whose_requests_do_not_repeat_soon_leaves_redis_alone(channel, valkey):
    commands = Commands(valkey.connection_url)
    assert set(await outcomes(channel, [asked("cheap") for _ in range(LEARNING)])) == {"miss"}
    assert commands()[0] > 0
    await outcomes(channel, [asked("cheap") for _ in range(400)])
    assert sum(commands()) < 100  # of 800


async def test_another_router_finds_the_answers_of_an_expensive_model(channel, start_router, worker, valkey):
    requests = [asked("expensive") for _ in range(8)]
    assert set(await outcomes(channel, requests)) == {"miss"}
    async with grpc.aio.insecure_channel(start_router([worker], valkey.connection_url, audit_share=0).address) as other:
        async with asyncio.timeout(60):
            while (await infer(other, requests[-1]))[1]["ringmesh-cache"] == "miss":  # written behind its answer
                requests.append(asked("expensive"))
                await infer(channel, requests[-1])
        assert (await outcomes(other, requests[:7])) == ["hit-shared"] * 7


@pytest.mark.parametrize("policy", POLICIES)
async def test_the_configuration_of_a_model_can_decide(channel, valkey, policy):
    commands = Commands(valkey.connection_url)
    await outcomes(channel, [asked(policy) for _ in range(LEARNING)])
    expected = (LEARNING, LEARNING) if policy == "always" else (0, 0)
    got = commands()
    async with asyncio.timeout(60):
        while got != expected:  # writes follow the answers
            await asyncio.sleep(0.01)
            got = tuple(map(sum, zip(got, commands(), strict=True)))
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    config = (await stub.ModelConfig(v2.ModelConfigRequest(name=policy))).config
    assert config.parameters["ringmesh_shared_tier"].string_value == policy


async def test_explain_traces_and_metrics_report_the_decision(start_router, worker, valkey, tmp_path):
    metrics = f"127.0.0.1:{free_port()}"
    router = start_router(
        [worker], valkey.connection_url, audit_share=0, trace_dir=tmp_path, trace_ratio=0, metrics_address=metrics
    ).address
    async with grpc.aio.insecure_channel(router) as channel:
        operator = router_pb2_grpc.RouterServiceStub(channel)
        explained = await operator.Explain(router_pb2.ExplainRequest(request=asked("never")))
        assert explained.shared_tier == "not looked up: the model's configuration says so"
        explained = await operator.Explain(router_pb2.ExplainRequest(request=asked("cheap")))
        assert explained.shared_tier == "looked up first: what computing takes is not known yet"
        await outcomes(channel, [asked("cheap")])
        explained = await operator.Explain(router_pb2.ExplainRequest(request=asked("cheap")))
        assert "recently computing took" in explained.shared_tier
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = (await stub.ModelConfig(v2.ModelConfigRequest(name="cheap"))).config
        assert config.parameters["ringmesh_shared_tier"].string_value == "auto"
    trace_id, _, _ = await traced(router, asked("never"))
    span = (await complete(tmp_path, trace_id, {SERVER}))[SERVER]
    assert span["attributes"]["ringmesh.cache.reason"] == "not looked up: the model's configuration says so"
    told = scrape(metrics)
    assert value(told, "ringmesh_shared_tier_decisions_total", model="cheap", decision="first") == 1
    assert value(told, "ringmesh_shared_tier_decisions_total", model="never", decision="skipped") == 1
