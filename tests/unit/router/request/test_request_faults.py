"""An exception in any step of a request: it is answered, once, those that joined are too, and nothing stays held."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2

from cache.keys.epochs import Epochs
from cache.keys.invalidation import InvalidationLog
from cache.mesh import Mesh
from cache.policy.refusals import Refusals
from cache.regions.peer_regions import PeerRegions
from cache.tiers.local_tier import LocalTier
from router.accounting.budgets import Budgets
from router.accounting.dispatch_metrics import DispatchMetrics
from router.admission.concurrency_limit import ConcurrencyLimit, ConcurrencyLimits
from router.admission.quotas import Quotas
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.request.call import Call
from router.request.path import RequestPath
from router.request.replies import Replies
from router.transport.worker_client import WorkerUnreachableError
from services.runtime.driver import Driver
from services.runtime.rpc.access import Access
from services.runtime.rpc.rpc import Answer, Failure, failure
from services.runtime.telemetry.tracing import Trace
from tests.conftest import sources_only
from tests.unit.router.fleets import MODEL, member, view

pytestmark = sources_only("faults are put in by subclasses, which compiled classes do not allow")

HASH = b"h" * 16
KEY = Epochs({}).key(MODEL.digest, MODEL.name, HASH)
RESULT = inference_pb2.WorkResult(response=b"answer", model_digest=MODEL.digest)
WRONG = inference_pb2.WorkResult(failure=inference_pb2.Failure(code=3, message="wrong"))
LOST = WorkerUnreachableError("gone")

# Each step of a request that is computed, by the part that does it.
ALWAYS = [
    *((Refusals, "check"), (LocalTier, "peek"), (LocalTier, "put"), (Mesh, "learn"), (Mesh, "fill")),
    *((Quotas, "take"), (ConcurrencyLimits, "of"), (ConcurrencyLimit, "admits"), (ConcurrencyLimit, "completed")),
    *((RetryBudget, "request"), (TailLatency, "of"), (TailLatency, "observe"), (DispatchMetrics, "attempted")),
    *((Trace, "traceparent"), (Trace, "span"), (Replies, "answer")),
]
# And of those that a worker is lost with, or answers with an error.
LOSING = [(RetryBudget, "take"), (DispatchMetrics, "attempted"), (Trace, "span")]
FAILING = [(Refusals, "keep"), (Replies, "failure")]


class FaultError(Exception):
    """What nobody foresaw."""


class Fault:
    """Has one method of one class raise while it is `armed`."""

    def __init__(self, kind=None, method=""):
        self.kind, self.method = kind, method
        self.armed = True
        self.met = 0

    def of(self, kind):
        """The class, or one like it with the fault."""
        if kind is not self.kind:
            return kind
        method = self.method

        def step(this, *arguments, **named):
            if self.armed:
                self.met += 1
                raise FaultError
            return getattr(super(broken, this), method)(*arguments, **named)

        broken = type(kind.__name__, (kind,), {method: step, "__slots__": ()})
        return broken

    def meets(self, name):
        if self.armed and self.method == name:
            self.met += 1
            raise FaultError


class Link:
    """The way to a worker that answers what the test says, in a later turn."""

    def __init__(self, router, outcomes):
        self._router = router
        self._outcomes = outcomes

    def send(self, digest, item):
        self._router.fault.meets("send")
        outcome = self._outcomes.pop(0) if self._outcomes else RESULT
        asyncio.get_running_loop().call_soon(lambda: item.done and item.done(outcome))

    def withdraw(self, item):
        item.done = None


class TellsReplies(Replies):
    """As Replies, without what they are counted in."""

    def __init__(self):
        pass

    def answer(self, call, found):
        return Answer(found.entry.value, ())

    def failure(self, call, error):
        return failure(error)

    def left(self, call):
        pass


class Router:
    def __init__(self, fault, outcomes=()):
        self.fault = fault
        self.outcomes = [*outcomes]
        purges = InvalidationLog(None, "test", 1.0)
        peers = PeerRegions([], purges)
        self.mesh = fault.of(Mesh)(fault.of(LocalTier)(1 << 20), None, purges, peers, fault.of(Refusals)(60))
        seen = view([member(name, link=Link(self, self.outcomes)) for name in ("a", "b", "c")])
        fleet = SimpleNamespace(
            view=seen, answered=lambda *_: fault.meets("answered"), failed=lambda *_: fault.meets("failed")
        )
        self.limits = fault.of(ConcurrencyLimits)(0.1, time.monotonic)
        self.dispatcher = Dispatcher(fleet, self.limits, fault.of(RetryBudget)(time.monotonic), fault.of(TailLatency)())
        self.dispatcher._parts = self.dispatcher._parts._replace(metrics=fault.of(DispatchMetrics)())
        if fault.kind is ConcurrencyLimit:
            for name in seen.members:
                limit = fault.of(ConcurrencyLimit)(0.1, time.monotonic)
                self.limits._limits[name, MODEL.digest] = limit
        self.requests = SimpleNamespace(in_flight=0)
        replies = TellsReplies()
        if fault.kind is Replies:
            fault.kind = TellsReplies
            replies = fault.of(TellsReplies)()
        quotas = fault.of(Quotas)({}, time.monotonic)
        accounts = SimpleNamespace(requests=self.requests, budgets=Budgets())
        self.path = RequestPath(
            fleet, self.mesh, None, self.dispatcher, None, accounts, replies, quotas, None, Access("")
        )
        self.path._keyer = SimpleNamespace(admit=lambda _: None, remember=lambda _: None)
        self.told = []

    def call(self):
        trace = self.fault.of(Trace)("a" * 32, "", sampled=False)
        call = Call(b"request", trace, (), "ModelInfer", None)
        call.model, call.name, call.request_hash = replace(MODEL, hedged=True), MODEL.name, HASH
        return call

    def answer(self, reply):
        self.told.append(reply)
        self.fault.meets("answer")

    async def ask(self):
        """What two equal requests at once are answered; the first of them."""
        told = len(self.told)
        for _ in range(2):
            Driver(self.path.answer(self.call()), self.answer).start()
        async with asyncio.timeout(60):
            while len(self.told) < told + 2:
                await asyncio.sleep(0)
        return self.told[told]

    def assert_nothing_is_held(self):
        assert self.requests.in_flight == 0
        assert not self.mesh.flights._flights
        assert not self.mesh._leaders
        assert [limit.in_flight for limit in self.limits._limits.values() if limit.in_flight] == []


async def through(fault, outcomes):
    """The answer while a step fails, and that to the next equal request."""
    router = Router(fault, outcomes)
    first = await router.ask()
    await asyncio.sleep(0)
    assert fault.met
    router.assert_nothing_is_held()
    fault.armed = False
    router.outcomes.clear()
    second = await router.ask() if router.mesh.refusals.kept.get(KEY) is None else None
    router.assert_nothing_is_held()
    return first, second


def is_internal(reply):
    # The engine answers INTERNAL to what the path raises.
    return isinstance(reply, FaultError) or (isinstance(reply, Failure) and reply.code is grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize(
    ("kind", "method", "outcomes"),
    [
        *((kind, method, []) for kind, method in [*ALWAYS, (None, "send"), (None, "answered")]),
        *((kind, method, [LOST]) for kind, method in [*LOSING, (None, "failed")]),
        *((kind, method, [WRONG]) for kind, method in FAILING),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
async def test_a_fault_in_a_step_ends_its_request_and_is_gone_with_the_next(kind, method, outcomes):
    first, second = await through(Fault(kind, method), outcomes)
    # A request that was wrong may be told so, whatever failed when that was to be remembered.
    assert is_internal(first) or (outcomes == [WRONG] and first.code is grpc.StatusCode.INVALID_ARGUMENT)
    assert second is None or (isinstance(second, Answer) and second.body == b"answer")


async def test_an_answer_that_cannot_be_sent_leaves_nothing_under_way():
    fault = Fault(None, "answer")
    _, second = await through(fault, [])
    assert second.body == b"answer"


async def test_a_worker_that_answers_with_nonsense_fails_its_request_alone():
    router = Router(Fault(None, ""), [SimpleNamespace(HasField=lambda _: False)])
    assert is_internal(await router.ask())
    router.assert_nothing_is_held()
    assert (await router.ask()).body == b"answer"
