"""With identities, a tenant gets no answer of another, and cannot tell from its own waiting what another has asked."""

import asyncio
import random
import time
from math import sqrt
from statistics import median

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import keys
from services.runtime.rpc.access import CREDENTIAL, credential_of
from tests import models
from tests.system import processes
from tests.system.test_cache import INFER

# Of each kind: what another tenant had asked before, and what it had not. A leak then differs by 5.9 deviations, and
# without one they differ by 5 in three of a hundred million runs.
SAMPLES = 24
OURS = ((CREDENTIAL, credential_of(processes.KEY_SECRET)),)


def parameter(name, value):
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Models that compute for 10 ms or more, whatever the input; and one that keeps state."""
    folder = tmp_path_factory.mktemp("isolation")
    models.slow(folder, 40, name="whole")
    rows = models.slow(folder, 40, name="rows").parent / "config.pbtxt"
    rows.write_text(f"max_batch_size: 8 {parameter('ringmesh_row_cache', 'true')}")
    models.slow(folder, 40, name="similar", config=parameter("ringmesh_semantic_threshold", "0.99"), width=8)
    models.slow(folder, 100, name="shared", config=parameter("ringmesh_tenant_scope", "false"))
    accumulator = models.accumulator(folder).parent / "config.pbtxt"
    accumulator.write_text(accumulator.read_text().replace("5000000", "3600000000"))
    return folder


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.jsonl"


@pytest.fixture(scope="module")
def bearer(key_file):
    """The metadata of each tenant."""
    made = {tenant: keys.create(key_file, tenant, tenant, ["infer"], [], None) for tenant in ("acme", "other")}
    return {tenant: (("authorization", f"Bearer {key}"),) for tenant, key in made.items()}


@pytest.fixture(scope="module")
def worker(repository, bearer, key_file):
    started = processes.start("services.inference", models=repository, threads=1, api_keys=key_file)
    yield started.address
    processes.kill(started)


@pytest.fixture(scope="module")
def router(worker, bearer, key_file):
    started = processes.start("router", workers=worker, api_keys=key_file)
    yield started.address
    processes.kill(started)


def request(model, x):
    made = v2.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=x.shape)
    made.raw_input_contents.append(x.astype(np.float32).tobytes())
    return made.SerializeToString()


async def asked(channel, model, x, metadata):
    """(seconds, where the answer came from, seconds of computing)"""
    start = time.perf_counter()
    call = channel.unary_unary(INFER)(request(model, x), metadata=metadata, timeout=60)
    await call
    seconds = time.perf_counter() - start
    trailers = dict(await call.trailing_metadata())
    return seconds, trailers["ringmesh-cache"], int(trailers["ringmesh-compute-us"]) / 1e6


async def observed(router, bearer, model, *, shape=(1, 1), ours=lambda x: x, at_once=False, samples=SAMPLES):
    """What one tenant sees of its own requests, by whether the other had asked the same: lists as `asked` returns.

    The other asks something before each of them, so that both kinds find the machine in the same state.
    """
    rng, order = np.random.default_rng(), [True, False] * samples
    random.Random(2).shuffle(order)
    seen = {True: [], False: []}
    async with grpc.aio.insecure_channel(router) as channel:
        for is_same in order:
            x = rng.normal(size=shape)
            theirs = asked(channel, model, x if is_same else rng.normal(size=shape), bearer["other"])
            mine = asked(channel, model, ours(x), bearer["acme"])
            if at_once:
                _, found = await asyncio.gather(theirs, mine)
            else:
                await theirs
                found = await mine
            seen[is_same].append(found)
    return seen


def rank_sum(first, second):
    """By how many standard deviations the ranks of two samples differ from those of one population (Mann-Whitney)."""
    wins = sum((a > b) + (a == b) / 2 for a in first for b in second)
    n, m = len(first), len(second)
    return (wins - n * m / 2) / sqrt(n * m * (n + m + 1) / 12)


def can_be_told_apart(seen, deviations=5):
    """Whether the times of the two kinds differ far beyond chance, by a large part of what computing takes."""
    same, fresh = ([seconds for seconds, _, _ in seen[kind]] for kind in (True, False))
    computing = median(seconds for _, _, seconds in seen[False])
    return abs(rank_sum(same, fresh)) > deviations and abs(median(same) - median(fresh)) > computing / 4


async def test_the_test_can_tell_where_tenants_share_answers(router, bearer):
    seen = await observed(router, bearer, "shared")
    assert {outcome for _, outcome, _ in seen[True]} == {"hit-local"}
    assert {outcome for _, outcome, _ in seen[False]} == {"miss"}
    assert can_be_told_apart(seen, deviations=2)


WAYS = [
    ("whole", {}),
    # The rows are known, the request is not.
    ("rows", {"shape": (2, 1), "ours": lambda x: x[::-1]}),
    # The vector has the same direction.
    ("similar", {"shape": (1, 8), "ours": lambda x: 2 * x}),
    # The other's request is under way, so that ours could join it, on the router or on the worker.
    ("whole", {"at_once": True}),
]
NAMES = ["whole", "rows", "similar", "at once"]


async def runs(worker, model):
    async with grpc.aio.insecure_channel(worker) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = await stub.ModelStatistics(v2.ModelStatisticsRequest(name=model), metadata=OURS)
    return found.model_stats[0].execution_count


@pytest.mark.parametrize(("model", "how"), WAYS, ids=NAMES)
async def test_a_tenant_gets_no_answer_of_another(router, worker, bearer, model, how):
    before = await runs(worker, model)
    seen = await observed(router, bearer, model, **how, samples=2)
    assert {outcome for kind in seen.values() for _, outcome, _ in kind} == {"miss"}
    # Each request of both was computed, so none joined another.
    assert await runs(worker, model) - before == 8


@pytest.mark.parametrize(
    ("model", "how"),
    [WAYS[0], *(pytest.param(*way, marks=pytest.mark.proof) for way in WAYS[1:])],
    ids=NAMES,
)
async def test_a_tenant_cannot_tell_by_its_waiting_what_another_has_asked(router, bearer, model, how):
    seen = await observed(router, bearer, model, **how)
    assert not can_be_told_apart(seen), seen


async def test_a_tenant_has_its_own_answers_again(router, bearer):
    x = np.full((1, 1), 0.5)
    async with grpc.aio.insecure_channel(router) as channel:
        for tenant in ("acme", "other"):
            outcomes = [(await asked(channel, "whole", x, bearer[tenant]))[1] for _ in range(2)]
            assert outcomes == ["miss", "hit-local"]


@pytest.mark.parametrize(("at", "sequence"), [("router", 7), ("worker", 8)])
async def test_tenants_with_the_same_sequence_id_have_sequences_of_their_own(router, worker, bearer, at, sequence):
    async def add(channel, tenant, value, *, start=False, says=""):
        made = v2.ModelInferRequest.FromString(request("accumulator", np.full((1, 1), value)))
        made.parameters["sequence_id"].int64_param = sequence
        made.parameters["sequence_start"].bool_param = start
        made.parameters["ringmesh_sequence_tenant"].string_param = says
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = await stub.ModelInfer(made, metadata=bearer[tenant], timeout=120)
        index = [output.name for output in answer.outputs].index("sum")
        return np.frombuffer(answer.raw_output_contents[index], np.float32).item()

    async with grpc.aio.insecure_channel({"router": router, "worker": worker}[at]) as channel:
        assert await add(channel, "acme", 1, start=True) == 1
        with pytest.raises(grpc.aio.AioRpcError, match="did not begin"):
            await add(channel, "other", 10, says="acme")
        assert await add(channel, "other", 100, start=True) == 100
        assert await add(channel, "acme", 2) == 3
        assert await add(channel, "other", 200) == 300
