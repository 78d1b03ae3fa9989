"""What becomes of a request: answered, kept, and given to those that joined, whatever its caller does meanwhile."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from opentelemetry.proto.trace.v1 import trace_pb2
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import model_config_pb2

from cache.keys.epochs import Epochs
from cache.keys.invalidation import InvalidationLog
from cache.keys.keys import RequestHasher
from cache.mesh import Mesh
from cache.policy.refusals import Refusals
from cache.regions.peer_regions import PeerRegions
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from router.accounting.accounts import Accounts
from router.accounting.cost import Prices
from router.admission.caller import ANYBODY, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimits
from router.admission.quotas import Quotas
from router.admission.tenant_limits import TenantLimits
from router.balancing.catalog import CACHE_STEPS, Catalog
from router.dispatch.attempts import FatalRequestError
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.request import replies
from router.request.audit import Audit
from router.request.path import RequestPath
from router.request.replies import Replies
from services.runtime.driver import Driver
from services.runtime.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from services.runtime.rpc.access import Access
from services.runtime.telemetry import spans
from services.runtime.telemetry.span_export import SpanQueue
from services.runtime.telemetry.spans import Process
from services.runtime.telemetry.tracing import Tracer
from tests.unit.router.fleets import member, view

DIGEST = b"d" * 16
RESULT = inference_pb2.WorkResult(response=b"answer", model_digest=DIGEST)
WRONG = inference_pb2.WorkResult(failure=inference_pb2.Failure(code=3, message="wrong", kind="invalid_input"))


def request(value=1.0, model="m", rows=1):
    made = v2.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[rows])
    made.raw_input_contents.append(np.full(rows, value, np.float32).tobytes())
    return made.SerializeToString()


class Worker:
    """Computes when it is told to; the link to it too."""

    def __init__(self):
        self.sent = []
        self.withdrawn = 0

    def send(self, digest, item):
        self.sent.append(item)

    def withdraw(self, sent):
        sent.done = None
        self.withdrawn += 1

    def end(self, outcome=RESULT, index=-1):
        self.sent[index].done(outcome)


class Router:
    """A path with one worker; `model` is what that says of its model."""

    def __init__(self, rates=(), tenant_limits=({}, {}, {}), **model):
        purges = InvalidationLog(None, "test", 1.0)
        self.mesh = Mesh(LocalTier(1 << 20), None, purges, PeerRegions([], purges), Refusals(60))
        self.worker = Worker()
        metadata = v2.ModelMetadataResponse(name="m", versions=["1"])
        metadata.inputs.add(name="x", datatype="FP32", shape=[-1])
        metadata.outputs.add(name="y", datatype="FP32", shape=[-1])
        said = {"name": "m", "version": "1", "digest": DIGEST, "cacheable": True, "metadata": metadata} | model
        self.member = member("w", link=self.worker)
        seen = view([self.member])
        fleet = SimpleNamespace(
            view=replace(seen, catalog=Catalog([[inference_pb2.ModelVersion(**said)]])),
            answered=lambda *_: None,
            failed=lambda *_: None,
        )
        limits = ConcurrencyLimits(0.1, time.monotonic)
        dispatcher = Dispatcher(fleet, limits, RetryBudget(time.monotonic), TailLatency())
        audit = Audit(dispatcher.run, 0.0, time.monotonic)
        self.tracer = tracer = Tracer(Process("router", "test"), 0.0, [])
        accounts = Accounts.create(Prices(0.0, 0.0), fleet, lambda: 0, cores=1, usage_tenants=3)
        self.requests, self.budgets, self.meter = accounts.requests, accounts.budgets, accounts.meter
        quotas = Quotas(dict(rates), time.monotonic)
        hasher = RequestHasher("secret")
        self.path = RequestPath(
            fleet,
            self.mesh,
            hasher,
            dispatcher,
            tracer,
            accounts,
            Replies(self.mesh, tracer, accounts, audit),
            quotas,
            audit,
            Access(""),
            TenantLimits(*tenant_limits, self.mesh.local, time.monotonic),
        )
        self.hash = hasher.hash(v2.ModelInferRequest.FromString(request()), ["y"])
        self.key = purges.epochs.key(DIGEST, "m", self.hash)
        self.told = []

    def send(self, data=None, *, deadline=None, metadata=()):
        """As the engine: begun without a driver, continued by one. Returns what cancels it."""
        coroutine = self.path.infer(request() if data is None else data, metadata, deadline)
        try:
            coroutine.send(None)
        except StopIteration as end:
            self._end(end.value)
            return None
        driver = Driver(coroutine, self._end)
        driver.start(deadline)
        return driver.cancel

    def _end(self, answer):
        if not isinstance(answer, asyncio.CancelledError):
            self.told.append(answer)
            if answer.afterwards is not None:
                answer.afterwards()

    def answers(self):
        """(body, outcome) of each."""
        return [(told.body, dict(told.trailing)["ringmesh-cache"]) for told in self.told]

    def counted(self, code):
        """Requests that ended with it."""
        return sum(
            sample.value
            for sample in self.requests.samples()
            if sample.family.name == "ringmesh_requests_total" and sample.labels[4] == code
        )

    def under_way(self):
        return self.requests.in_flight, len(self.mesh.flights)


async def test_it_is_answered_and_kept():
    router = Router()
    router.send()
    assert (router.told, router.under_way()) == ([], (1, 1))
    router.worker.end()
    router.send()
    assert router.answers() == [(b"answer", "miss"), (b"answer", "hit-local")]
    assert (router.under_way(), router.counted("OK")) == ((0, 0), 2)


async def test_a_request_lasts_no_negative_time_if_the_clock_is_set_back_meanwhile(monkeypatch):
    router = Router()
    router.send()
    router.send(request(value=2.0))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    router.worker.end(index=0)
    router.worker.end(WRONG, index=1)
    assert (router.counted("OK"), router.counted("INVALID_ARGUMENT")) == (1, 1)
    assert [series.sum_ns for _, series in router.requests._all()] == [0, 0]


async def test_a_hit_is_answered_where_it_is_received():
    router = Router()
    router.send()
    router.worker.end()
    for _ in range(2):  # parsed, and recognized by its bytes
        assert await asyncio.to_thread(router.send) is None
    assert router.answers()[1:] == [(b"answer", "hit-local")] * 2


@pytest.mark.parametrize(
    ("data", "metadata", "code"),
    [
        (b"\xff\xff", (), "INVALID_ARGUMENT"),
        (request(model="nobody"), (), "NOT_FOUND"),
        (request(), (("cache-control", "max-age=soon"),), "INVALID_ARGUMENT"),
        (request(), (("ringmesh-tenant", " a"),), "INVALID_ARGUMENT"),
        (request(), (("cache-control", "only-if-cached"),), "FAILED_PRECONDITION"),
    ],
)
async def test_what_is_wrong_with_a_request_is_told_and_counted(data, metadata, code):
    router = Router()
    router.send(data, metadata=metadata)
    (failed,) = router.told
    assert (failed.code.name, router.counted(code), router.under_way()) == (code, 1, (0, 0))


class Kept:
    """Takes spans, and keeps their encoded form."""

    name = "test"

    def __init__(self):
        self.spans = []

    def pack(self, span):
        self.spans.append(trace_pb2.Span.FromString(span.to_otlp()))

    async def send(self, batch):
        return "sent"

    async def close(self):
        pass


async def test_names_of_models_that_do_not_exist_are_in_spans_and_nowhere_kept():
    router, kept = Router(), Kept()
    router.tracer._queues = queues = [SpanQueue(kept)]
    names = [str(number) * 1000 for number in range(5)]
    sizes = []
    for name in names:
        router.send(request(model=name))
        sizes.append((replies._shared.cache_info().currsize, spans._text.cache_info().currsize))
    await queues[0].close()
    found = [[a.value.string_value for a in span.attributes if a.key == "ringmesh.model.name"] for span in kept.spans]
    assert found == [[name] for name in names]
    assert len(set(sizes)) == 1


ACME = (("ringmesh-tenant", "acme"),)


async def test_a_tenant_has_so_many_requests_at_once_and_hits_are_not_among_them():
    router = Router(tenant_limits=({}, {"acme": 1}, {}))
    router.send(metadata=ACME)
    router.send(metadata=ACME)
    assert [told.code.name for told in router.told] == ["RESOURCE_EXHAUSTED"]
    assert "tenant 'acme' has 1 requests under way" in router.told[0].message
    router.worker.end()
    for _ in range(2):
        router.send(metadata=ACME)
    assert [dict(told.trailing)["ringmesh-cache"] for told in router.told[1:]] == ["miss", "hit-local", "hit-local"]
    router.send(request(value=2.0), metadata=ACME)
    router.worker.end(UnavailableError("nobody"))
    router.send(request(value=3.0), metadata=ACME)
    assert router.under_way() == (1, 1)


async def test_the_bytes_of_all_requests_of_a_tenant_count():
    router = Router(tenant_limits=({"acme": 1.0}, {}, {}))
    router.send(metadata=ACME)
    router.worker.end()
    router.send(metadata=ACME)
    router.send()
    assert [getattr(told, "code", None) and told.code.name for told in router.told] == [
        None, "RESOURCE_EXHAUSTED", None,
    ]  # fmt: skip
    assert "its quota of 1 bytes of requests a second" in router.told[1].message


async def test_answers_beyond_a_tenants_share_leave_the_local_tier():
    router = Router(tenant_limits=({}, {}, {"acme": 1e-9}))
    router.send(metadata=ACME)
    router.worker.end()
    assert router.mesh.local.peek(router.key) is None
    router.send()
    router.worker.end()
    assert router.mesh.local.peek(router.key) is not None


async def test_who_asks_meanwhile_joins():
    router = Router()
    router.send()
    router.send()
    router.worker.end()
    assert sorted(router.answers()) == [(b"answer", "joined"), (b"answer", "miss")]
    assert (len(router.worker.sent), router.under_way()) == (1, (0, 0))


async def test_who_joined_one_that_fails_is_told_so():
    router = Router()
    router.send()
    router.send()
    router.worker.end(UnavailableError("nobody"))
    assert [told.message for told in router.told] == ["nobody"] * 2
    assert router.under_way() == (0, 0)


async def test_a_caller_that_leaves_is_counted_and_what_is_to_be_kept_is_computed_all_the_same():
    router = Router()
    leave = router.send()
    leave()
    leave()
    assert (router.counted("CANCELLED"), router.requests.in_flight, router.worker.withdrawn) == (1, 0, 0)
    router.worker.end()
    assert router.told == []
    assert router.mesh.local.peek(router.key).value == b"answer"


async def test_what_is_not_kept_is_not_computed_for_nobody():
    router = Router(cacheable=False)
    router.send()()
    assert (router.worker.withdrawn, router.told, router.under_way()) == (1, [], (0, 0))


async def test_what_is_not_kept_is_answered_as_such():
    router = Router(cacheable=False)
    router.send()
    router.worker.end()
    assert router.answers() == [(b"answer", "bypass")]
    assert router.mesh.local.peek(router.key) is None


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


async def test_a_caller_whose_time_is_up_is_told_so_and_others_have_the_answer_later():
    router = Router()
    router.send(deadline=time.monotonic() - 1)
    router.send()
    await until(lambda: router.told)
    assert router.told[0].code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert router.counted("DEADLINE_EXCEEDED") == 1
    router.worker.end()
    assert router.told[1].body == b"answer"
    assert (router.mesh.local.peek(router.key).value, router.under_way()) == (b"answer", (0, 0))


async def test_what_is_not_kept_is_withdrawn_when_its_time_is_up():
    router = Router(cacheable=False)
    router.send(deadline=time.monotonic() - 1)
    await until(lambda: router.told)
    assert (router.told[0].code, router.worker.withdrawn) == (grpc.StatusCode.DEADLINE_EXCEEDED, 1)


async def test_a_request_that_is_wrong_is_not_sent_again():
    router = Router()
    router.send()
    router.worker.end(InvalidArgumentError("wrong"))
    router.send()
    assert [error.message for error in router.told] == ["wrong", "wrong"]
    assert (len(router.worker.sent), router.under_way()) == (1, (0, 0))


async def test_a_tenant_beyond_its_quota_is_refused_and_nothing_is_left_under_way():
    router = Router([("", 1.0)])
    router.send()
    router.send(request(2.0))
    (refused,) = router.told
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (len(router.worker.sent), router.under_way()) == (1, (1, 1))


async def test_a_refusal_is_not_for_another_tenant_that_joined():
    router = Router([("poor", 1.0), ("rich", 100.0)])
    router.mesh.shared = Redis()
    poor, rich = (("ringmesh-tenant", "poor"),), (("ringmesh-tenant", "rich"),)
    router.send(request(2.0), metadata=poor)
    await until(lambda: router.worker.sent)
    router.send(metadata=poor)
    router.send(metadata=rich)
    await until(lambda: router.told)
    assert router.told[0].code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: len(router.worker.sent) == 2)
    router.worker.end()
    assert router.told[1].body == b"answer"


async def test_an_answer_that_came_since_the_first_look_is_given():
    router = Router()
    coroutine = router.path.infer(request(), (), None)
    coroutine.send(None)
    router.send()
    router.worker.end()
    Driver(coroutine, router._end).start()
    assert router.answers()[1] == (b"answer", "hit-local")


async def test_an_answer_is_filed_by_the_purges_from_before_it_was_computed():
    router = Router()
    router.send()
    router.mesh.purges.epochs = Epochs({"model:m": 7})
    router.worker.end()
    assert router.mesh.local.peek(router.mesh.purges.epochs.key(DIGEST, "m", router.hash)) is None


class Redis:
    """Holds what it is given to hold."""

    ttl_ms = 1000

    def __init__(self, held=None):
        self.held = held
        self.written = []

    async def get_answer(self, key, on_reply=None):
        await asyncio.sleep(0)
        if isinstance(self.held, Exception):
            raise self.held
        return self.held

    def put(self, key, entry, kept_ms):
        self.written.append(key)


async def test_what_redis_has_is_not_computed_and_counts_on_no_quota():
    router = Router([("", 1.0)])
    router.mesh.shared = Redis(Entry(b"held", 5))
    for value in (2.0, 3.0):
        router.send(request(value))
        router.send(request(value))
    await until(lambda: len(router.told) == 4)
    assert sorted(router.answers()) == [(b"held", "hit-shared")] * 2 + [(b"held", "joined")] * 2
    assert (router.worker.sent, router.under_way()) == ([], (0, 0))


async def test_what_redis_lacks_is_computed_and_written_there():
    router = Router()
    router.mesh.shared = Redis()
    router.send()
    assert router.worker.sent == []
    await until(lambda: router.worker.sent)
    router.worker.end()
    assert router.answers() == [(b"answer", "miss")]
    assert router.mesh.shared.written == [router.key]


async def test_a_fault_of_ours_is_told_as_one_and_leaves_nothing_under_way():
    router = Router()
    router.mesh.shared = Redis(ValueError("secret"))
    router.send()
    await until(lambda: router.told)
    (error,) = router.told
    assert error.code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message
    assert router.under_way() == (0, 0)


async def test_when_the_router_stops_those_that_wait_are_told_so():
    router = Router()
    router.send()
    router.send()
    await router.mesh.close()
    assert [told.code for told in router.told] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert (router.worker.withdrawn, router.under_way()) == (1, (0, 0))


async def test_a_request_after_a_purge_joins_nothing_on_a_worker_that_began_before_it():
    router = Router()
    router.send()
    router.mesh.purges.epochs = Epochs({"model:m": 5})
    router.send()
    before, after = router.worker.sent
    assert before.request_hash == router.key != after.request_hash


async def test_what_is_to_be_computed_anew_joins_nothing():
    router = Router()
    router.send()
    router.send(metadata=(("cache-control", "no-cache"),))
    assert [work.request_hash for work in router.worker.sent] == [router.key, b""]


async def test_a_stale_answer_is_given_and_computed_anew_by_one():
    router = Router(ttl_ms=1000, stale_ms=60_000)
    router.mesh.local.put(router.key, Entry(b"old", 5, time.time_ns() // 1_000_000 - 2000))
    router.send()
    router.send()
    assert router.answers() == [(b"old", "hit-local")] * 2
    assert ("ringmesh-stale", "true") in router.told[0].trailing
    await until(lambda: router.worker.sent)
    router.worker.end()
    await until(lambda: router.mesh.renewals.counts["computed"])
    router.send()
    assert router.answers()[2] == (b"answer", "hit-local")
    assert len(router.worker.sent) == 1


async def test_a_sequence_is_computed_in_order():
    router = Router()
    made = v2.ModelInferRequest.FromString(request())
    made.parameters["sequence_id"].int64_param = 7
    for _ in range(2):
        router.send(made.SerializeToString())
    assert len(router.worker.sent) == 1
    router.worker.end()
    await until(lambda: len(router.worker.sent) == 2)
    router.worker.end()
    assert router.answers() == [(b"answer", "bypass")] * 2
    assert len(router.path._sequences) == 0


async def test_one_with_time_left_asks_again_when_the_first_ran_out_of_it():
    router = Router()
    router.send(deadline=time.monotonic() + 600)
    router.send()
    router.worker.end(DeadlineExceededError("late"))
    assert [told.code for told in router.told] == [grpc.StatusCode.DEADLINE_EXCEEDED]
    router.worker.end()
    assert router.told[1].body == b"answer"
    assert len(router.worker.sent) == 2


def ensemble_of(digest):
    """What a fleet serves: model m with this digest, and an ensemble that runs it twice, each through the cache."""
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}
    flow = [("x", "between"), ("between", "y")]
    steps = [{"model_name": "m", "input_map": {"x": a}, "output_map": {"y": b}} for a, b in flow]
    config = model_config_pb2.ModelConfig(
        input=[tensor],
        output=[tensor | {"name": "y"}],
        ensemble_scheduling={"step": steps},
        parameters={CACHE_STEPS: {"string_value": "true"}},
    )
    metadata = v2.ModelMetadataResponse(inputs=[{"name": "x", "datatype": "FP32", "shape": [-1]}])
    metadata.outputs.add(name="y", datatype="FP32", shape=[-1])
    common = {"version": "1", "cacheable": True, "metadata": metadata}
    whole = inference_pb2.Ensemble(own_digest=b"e" * 16, config=config)
    return Catalog(
        [
            [
                inference_pb2.ModelVersion(name="m", digest=digest, **common),
                inference_pb2.ModelVersion(name="e", digest=b"e" * 16, ensemble=whole, **common),
            ]
        ]
    )


def computed(value, digest):
    response = v2.ModelInferResponse(raw_output_contents=[np.float32(value).tobytes()])
    response.outputs.add(name="y", datatype="FP32", shape=[1])
    return inference_pb2.WorkResult(response=response.SerializeToString(), model_digest=digest)


async def test_an_ensemble_runs_again_if_a_step_is_replaced_meanwhile_and_nothing_is_filed_under_the_old_steps():
    router, new = Router(), b"n" * 16
    fleet = router.path._fleet
    before, after = (replace(fleet.view, catalog=ensemble_of(digest)) for digest in (DIGEST, new))
    fleet.view = before
    router.send(request(model="e"))
    await until(lambda: router.worker.sent)
    router.worker.end(computed(10, DIGEST))
    await until(lambda: len(router.worker.sent) == 2)
    fleet.view = after
    router.worker.end(computed(21, new))
    await until(lambda: len(router.worker.sent) == 3)
    router.worker.end(computed(20, new))
    await until(lambda: len(router.worker.sent) == 4)
    router.worker.end(computed(40, new))
    await until(lambda: router.told)
    answer = v2.ModelInferResponse.FromString(router.told[0].body)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32) == [40]
    fleet.view = before  # rolled back
    router.send(request(model="e"))
    await until(lambda: len(router.worker.sent) == 5)
    router.worker.end(computed(20, DIGEST))
    await until(lambda: router.told[1:])
    assert dict(router.told[1].trailing)["ringmesh-cache"] == "miss"


async def test_an_ensemble_is_not_run_again_and_again_while_workers_hold_different_versions_of_a_step():
    router = Router()
    fleet = router.path._fleet
    fleet.view = replace(fleet.view, catalog=ensemble_of(DIGEST))

    def compute(_, item):
        router.worker.sent.append(item)
        item.done(computed(20, b"n" * 16))  # the version of this worker; the catalog has that of another

    router.worker.send = compute
    router.send(request(1.0, model="e"))
    await until(lambda: router.told)
    assert len(router.worker.sent) == 2 * 5
    router.send(request(2.0, model="e"))
    await until(lambda: router.told[1:])
    assert len(router.worker.sent) == 2 * 6
    assert [dict(told.trailing)["ringmesh-cache"] for told in router.told] == ["miss", "miss"]


def asking_for_y(**parameters):
    made = v2.ModelInferRequest.FromString(request())
    made.outputs.add(name="y")
    for name, value in parameters.items():
        made.parameters[name].string_param = value
    return made.SerializeToString()


def serve(router, digest, *outputs):
    """What a load does: the router's fleet serves model m with this digest and these outputs from now on."""
    fleet = router.path._fleet
    metadata = v2.ModelMetadataResponse(name="m", versions=["1"])
    metadata.inputs.add(name="x", datatype="FP32", shape=[-1])
    for name in outputs:
        metadata.outputs.add(name=name, datatype="FP32", shape=[-1])
    model = inference_pb2.ModelVersion(name="m", version="1", digest=digest, cacheable=True, metadata=metadata)
    fleet.view = replace(fleet.view, catalog=Catalog([[model]]))


async def test_the_answer_of_a_version_with_more_outputs_is_not_kept_for_a_request_that_named_all_of_the_old_one():
    router, new = Router(), b"n" * 16
    router.send(asking_for_y())  # of a model with this output alone
    router.worker.end(inference_pb2.WorkResult(response=b"y alone", model_digest=new))
    serve(router, new, "y", "z")
    router.send()
    router.worker.end(inference_pb2.WorkResult(response=b"y and z", model_digest=new))
    assert router.answers() == [(b"y alone", "miss"), (b"y and z", "miss")]


async def test_what_a_later_version_refused_is_not_refused_after_a_rollback():
    router, new = Router(), b"n" * 16
    router.send()
    router.worker.end(inference_pb2.WorkResult(failure=WRONG.failure, model_digest=new))
    serve(router, new, "y")
    serve(router, DIGEST, "y")
    router.send()
    router.worker.end()
    assert router.told[0].code is grpc.StatusCode.INVALID_ARGUMENT
    assert router.told[1].body == b"answer"


@pytest.mark.parametrize("name", ["priority", "timeout"])
async def test_a_request_with_a_wrong_parameter_that_is_no_part_of_its_key_is_refused_alone(name):
    router = Router()
    router.send(asking_for_y(**{name: "soon"}))
    assert (router.told[0].code, router.worker.sent) == (grpc.StatusCode.INVALID_ARGUMENT, [])
    assert f"{name} must be a whole number" in router.told[0].message
    router.send()
    router.worker.end()
    assert router.told[1].body == b"answer"


async def test_a_caller_of_a_model_is_not_told_of_the_ensemble_whose_step_was_refused_first():
    router = Router()
    fleet = router.path._fleet
    fleet.view = replace(fleet.view, catalog=ensemble_of(DIGEST))
    router.send(request(model="e"))
    await until(lambda: router.worker.sent)
    router.worker.end(WRONG)
    await until(lambda: router.told)
    router.send()
    assert [told.message for told in router.told] == ["step 'm' of ensemble 'e': wrong", "wrong"]


@pytest.mark.parametrize(
    "error", [RefusedError("slow", ANYBODY, retry_after=2.5, kind="quota"), FatalRequestError("no")]
)
def test_an_error_of_a_step_is_of_the_same_class_with_all_that_it_says(error):
    told = error.within("step 'm' of ensemble 'e'")
    assert type(told) is type(error)
    assert vars(told) == vars(error) | {"message": f"step 'm' of ensemble 'e': {error.message}"}
