"""What becomes of a miss: answered, kept, and told to those that joined, whatever its caller does meanwhile."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2

from cache.keys.epochs import Epochs
from cache.keys.invalidation import PurgeBoard
from cache.mesh import Mesh
from cache.policy.freshness import Freshness
from cache.policy.refusals import Refusals
from cache.regions.peer_regions import PeerRegions
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from router.admission.caller import ANYBODY, Caller, Priority
from router.admission.quotas import Quotas
from router.balancing.catalog import ModelEntry
from router.request.call import Admitted
from router.request.miss import Misses
from services.runtime.errors import InvalidArgumentError, UnavailableError
from services.runtime.rpc.rpc import Answer, failure
from services.runtime.telemetry.tracing import untraced
from tests.unit.router.fleets import member

MODEL = ModelEntry("m", "1", b"d" * 16, "", None)
RESULT = inference_pb2.WorkResult(response=b"answer", model_digest=MODEL.digest)
HASH = b"h" * 16


def _key(request_hash):
    return Epochs({}).key(MODEL.digest, MODEL.name, request_hash)


KEY = _key(HASH)
WORKER = member("w")


class Replies:
    """Tells what it was asked to tell."""

    def __init__(self):
        self.leavers = []

    def answer(self, call, found):
        return Answer(found.entry.value, (("ringmesh-cache", found.outcome),))

    def failure(self, call, error):
        return failure(error)

    def left(self, call):
        self.leavers.append(call)


class Fleet:
    """Computes when it is told to."""

    def __init__(self):
        self.asked = []
        self.cancelled = 0

    def begin(self, asked, done):
        self.asked.append(asked)
        self.end = done
        return self

    def cancel(self):
        self.cancelled += 1


class Router:
    def __init__(self, rates=()):
        purges = PurgeBoard(None, "test", 1.0)
        self.mesh = Mesh(LocalTier(1 << 20), None, purges, PeerRegions([], purges), Refusals(60))
        self.fleet, self.replies, self.requests = Fleet(), Replies(), SimpleNamespace(in_flight=0)
        quotas = Quotas(dict(rates), time.monotonic)
        self.misses = Misses(self.mesh, self.fleet, quotas, self.replies, self.requests)
        self.told = []

    def begin(self, *, request_hash=HASH, deadline=None, model=MODEL, caller=ANYBODY):
        call = Admitted(b"request", untraced(), (), "ModelInfer")
        call.caller = caller
        call.model, call.name, call.request_hash = model, model.name, request_hash
        return self.misses.begin(call, deadline, self.told.append)

    def answers(self):
        """(body, outcome) of each."""
        return [(told.body, dict(told.trailing)["ringmesh-cache"]) for told in self.told]


async def test_it_is_answered_and_kept():
    router = Router()
    assert router.begin() is not None
    assert (router.told, router.requests.in_flight) == ([], 1)
    router.fleet.end((RESULT, WORKER))
    assert router.answers() == [(b"answer", "miss")]
    assert router.mesh.local.peek(KEY).value == b"answer"
    assert (router.requests.in_flight, KEY in router.mesh.flights) == (0, False)


async def test_who_asks_meanwhile_joins():
    router = Router()
    router.begin()
    assert router.begin() is None  # to be finished by who can wait
    joined = asyncio.create_task(router.mesh.get_or_compute(KEY, None, None, untraced()))
    await asyncio.sleep(0)
    router.fleet.end((RESULT, WORKER))
    found = await joined
    assert (found.outcome, found.entry.value, len(router.fleet.asked)) == ("joined", b"answer", 1)


async def test_who_joined_one_that_fails_is_told_so():
    router = Router()
    router.begin()
    joined = asyncio.create_task(router.mesh.get_or_compute(KEY, None, None, untraced()))
    await asyncio.sleep(0)
    error = UnavailableError("nobody")
    router.fleet.end(error)
    assert [told.message for told in router.told] == [error.message]
    with pytest.raises(UnavailableError, match="nobody"):
        await joined
    assert KEY not in router.mesh.flights


async def test_a_caller_that_leaves_is_counted_and_what_is_to_be_kept_is_computed_all_the_same():
    router = Router()
    leave = router.begin()
    leave()
    leave()
    assert (len(router.replies.leavers), router.requests.in_flight, router.fleet.cancelled) == (1, 0, 0)
    router.fleet.end((RESULT, WORKER))
    assert router.told == []
    assert router.mesh.local.peek(KEY).value == b"answer"


async def test_what_is_not_kept_is_not_computed_for_nobody():
    router = Router()
    router.begin(request_hash=b"")()
    assert (router.fleet.cancelled, router.told) == (1, [])


async def test_what_is_not_kept_is_answered_as_such():
    router = Router()
    router.begin(request_hash=b"")
    router.fleet.end((RESULT, WORKER))
    assert router.answers() == [(b"answer", "bypass")]
    assert router.mesh.local.peek(KEY) is None


async def test_a_caller_whose_time_is_up_is_told_so_and_others_have_the_answer_later():
    router = Router()
    router.begin(deadline=time.monotonic() - 1)
    await asyncio.sleep(0.01)
    (late,) = router.told
    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    router.fleet.end((RESULT, WORKER))
    assert router.told == [late]
    assert (router.mesh.local.peek(KEY).value, router.requests.in_flight) == (b"answer", 0)


async def test_a_request_that_is_wrong_is_not_sent_again():
    router = Router()
    router.begin()
    router.fleet.end(InvalidArgumentError("wrong"))
    router.begin()
    assert [error.message for error in router.told] == ["wrong", "wrong"]
    assert (len(router.fleet.asked), router.requests.in_flight) == (1, 0)


async def test_a_tenant_beyond_its_quota_is_refused_and_nothing_is_left_under_way():
    router = Router([("", 1.0)])
    router.begin()
    router.begin(request_hash=b"g" * 16)
    (refused,) = router.told
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (len(router.fleet.asked), router.requests.in_flight) == (1, 1)


async def test_an_answer_that_came_since_the_first_look_is_given():
    router = Router()
    router.begin()
    router.fleet.end((RESULT, WORKER))
    router.begin()
    assert router.answers()[1] == (b"answer", "hit-local")


async def test_an_answer_is_filed_by_the_purges_from_before_it_was_computed():
    router = Router()
    router.begin()
    router.mesh.purges.epochs = Epochs({"model:m": 7})
    router.fleet.end((RESULT, WORKER))
    assert router.mesh.local.peek(router.mesh.purges.epochs.key(MODEL.digest, MODEL.name, HASH)) is None


class Redis:
    """Holds what it is given to hold."""

    ttl_ms = 1000

    def __init__(self, held=None):
        self.held = held
        self.written = []

    async def get_answer(self, key):
        await asyncio.sleep(0)
        if isinstance(self.held, Exception):
            raise self.held
        return self.held

    def put(self, key, entry, kept_ms):
        self.written.append(key)


async def test_what_redis_has_is_not_computed_and_counts_on_no_quota():
    router = Router([("", 1.0)])
    router.mesh.shared = Redis(Entry(b"held", 5))
    for name in (b"a", b"b"):
        router.begin(request_hash=name * 16)
        joined = asyncio.create_task(router.mesh.get_or_compute(_key(name * 16), None, None, untraced()))
        assert (await joined).entry.value == b"held"
    assert router.answers() == [(b"held", "hit-shared")] * 2
    assert (router.fleet.asked, router.requests.in_flight) == ([], 0)


async def test_what_redis_lacks_is_computed_and_written_there():
    router = Router()
    router.mesh.shared = Redis()
    router.begin()
    assert router.fleet.asked == []
    for _ in range(3):
        await asyncio.sleep(0)
    router.fleet.end((RESULT, WORKER))
    assert router.answers() == [(b"answer", "miss")]
    assert router.mesh.shared.written == [KEY]


async def test_a_fault_of_ours_is_told_as_one_and_leaves_nothing_under_way():
    router = Router()
    router.mesh.shared = Redis(ValueError("secret"))
    router.begin()
    for _ in range(3):
        await asyncio.sleep(0)
    (error,) = router.told
    assert error.code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message
    assert (router.requests.in_flight, KEY in router.mesh.flights) == (0, False)


async def test_a_request_after_a_purge_joins_nothing_on_a_worker_that_began_before_it():
    router = Router()
    router.begin()
    router.mesh.purges.epochs = Epochs({f"model:{MODEL.name}": 5})
    router.begin()
    before, after = router.fleet.asked
    assert before.request_hash == KEY != after.request_hash
    assert before.place == after.place == HASH


async def test_it_is_asked_for_on_behalf_of_its_caller():
    router = Router()
    router.begin(caller=Caller("t", Priority.CRITICAL))
    assert router.fleet.asked[0].caller == Caller("t", Priority.CRITICAL)


@pytest.mark.parametrize(
    "more",
    [{"row_cache": True}, {"semantic_threshold": 0.9}, {"freshness": Freshness(1000, 0)}],
    ids=lambda more: next(iter(more)),
)
async def test_what_needs_more_than_a_computation_is_left_to_others(more):
    router = Router()
    assert router.begin(model=replace(MODEL, **more)) is None
    assert (router.fleet.asked, router.requests.in_flight) == ([], 0)
