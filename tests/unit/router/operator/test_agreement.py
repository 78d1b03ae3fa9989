"""Who is told what, where workers know different decisions about models."""

import asyncio

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.operator.agreement import Agreement, next_ns
from router.transport.worker_client import WorkerUnreachableError

GET = "/ringmesh.inference.v1.InferenceWorkerService/GetDecision"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
UNLOAD = "/inference.GRPCInferenceService/RepositoryModelUnload"


class Worker:
    """Keeps decisions as (time, loaded, by the fleet), and what it was told."""

    reason, healthy, broken = "", True, False

    def __init__(self, name, **decisions):
        self.address = self.worker_id = name
        self.known = decisions
        self.told = []
        self.link = self

    @property
    def decisions(self):
        return tuple(self.decided(model) for model in self.known)

    def decided(self, model):
        decided_ns, _, fleet = self.known[model]
        return inference_pb2.ModelDecision(model=model, decided_unix_ns=decided_ns, fleet=fleet)

    async def call(self, method, request, seconds):
        if self.broken:
            raise WorkerUnreachableError("gone")
        if method == GET:
            model = inference_pb2.GetDecisionRequest.FromString(request).model
            load = v2.RepositoryModelLoadRequest(model_name=model) if self.known[model][1] else None
            return inference_pb2.GetDecisionResponse(decision=self.decided(model), load=load).SerializeToString()
        message = (v2.RepositoryModelLoadRequest if method == LOAD else v2.RepositoryModelUnloadRequest).FromString(
            request
        )
        decided_ns = message.parameters["ringmesh_decided_ns"].int64_param
        self.known[message.model_name] = (decided_ns, method == LOAD, True)
        self.told.append((method, message.model_name, decided_ns))
        return b""


class Fleet:
    def __init__(self, *workers):
        self.members = workers

    async def describe(self, member):
        pass


async def agree(agreement):
    agreement.compare()
    while agreement._sending:
        await asyncio.gather(*agreement._sending.values())


async def test_a_worker_that_lacks_a_decision_of_the_fleet_is_told_the_latest():
    old = Worker("old", m=(100, True, True), n=(300, True, True))
    newer = Worker("newer", m=(200, False, True))
    empty = Worker("empty")
    await agree(Agreement(Fleet(old, newer, empty), lambda: 0.0))
    assert old.told == [(UNLOAD, "m", 200)]
    assert newer.told == [(LOAD, "n", 300)]
    assert sorted(empty.told) == [(LOAD, "n", 300), (UNLOAD, "m", 200)]


async def test_what_one_worker_decided_alone_is_not_told_and_stands_against_what_was_before():
    alone = Worker("alone", m=(200, False, False))
    other = Worker("other", m=(100, True, True))
    empty = Worker("empty")
    await agree(Agreement(Fleet(alone, other, empty), lambda: 0.0))
    assert (alone.told, other.told, empty.told) == ([], [], [(LOAD, "m", 100)])


async def test_a_worker_that_cannot_follow_is_asked_again_after_a_while_and_does_not_keep_the_others_waiting():
    now = 0.0
    source, broken, empty = Worker("source", m=(100, False, True)), Worker("broken"), Worker("empty")
    broken.broken = True
    agreement = Agreement(Fleet(source, broken, empty), lambda: now)
    await agree(agreement)
    assert empty.told == [(UNLOAD, "m", 100)]
    broken.broken = False
    await agree(agreement)
    assert broken.told == []
    now = 31.0
    await agree(agreement)
    assert broken.told == [(UNLOAD, "m", 100)]


async def test_workers_that_cannot_be_asked_are_left_out():
    away = Worker("away")
    away.healthy = False
    await agree(Agreement(Fleet(Worker("source", m=(100, False, True)), away), lambda: 0.0))
    assert away.told == []


async def test_a_worker_that_was_lost_while_it_was_told_is_told_as_soon_as_it_is_back():
    source, lost = Worker("source", m=(100, False, True)), Worker("lost")
    agreement = Agreement(Fleet(source, lost), lambda: 0.0)
    lost.broken = True
    await agree(agreement)
    lost.healthy = False
    await agree(agreement)
    lost.healthy, lost.broken = True, False
    await agree(agreement)
    assert lost.told == [(UNLOAD, "m", 100)]


async def test_what_the_source_has_decided_for_itself_meanwhile_is_not_passed_on():
    source, other = Worker("source", m=(100, True, True)), Worker("other")
    agreement = Agreement(Fleet(source, other), lambda: 0.0)
    agreement.compare()
    source.known["m"] = (200, False, False)
    await asyncio.gather(*agreement._sending.values())
    assert other.told == []


def test_a_new_decision_is_later_than_every_known_one_and_never_equal_to_another():
    ahead = 1 << 61
    workers = [Worker("w", m=(ahead, True, True)), Worker("x")]
    made = {next_ns(workers) for _ in range(20)}
    assert min(made) > ahead
    assert len(made) > 1
    assert next_ns([Worker("x")]) < ahead
