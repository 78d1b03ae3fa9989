"""The path of a request: admit, key, local tier, join, shared tier, peers, pick, forward, fill, answer."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher
from cache.mesh import Compute, Computed, Found, Mesh
from cache.tiers.entry import Entry
from router.accounting.accounts import Accounts
from router.accounting.request_metrics import STEP
from router.admission.caller import ROUTER, RefusedError
from router.admission.quotas import Quotas
from router.admission.tenant_limits import TenantLimits
from router.balancing.catalog import Catalog, ModelEntry
from router.dispatch.attempts import DispatchRequest, DispatchResult, Workers
from router.dispatch.dispatcher import Dispatcher
from router.request import controlled, ensembles, rows
from router.request.audit import Audit
from router.request.call import Call
from router.request.keyer import Keyer
from router.request.local_answers import LocalAnswers
from router.request.replies import Replies
from router.request.rows import RowCache
from router.request.semantic import SemanticMatches
from services.runtime import driver, faults
from services.runtime.driver import ON_LOOP, DeadlinePassed, in_task
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    RingmeshError,
)
from services.runtime.keyed_lock import KeyedLock
from services.runtime.large_result import Result
from services.runtime.oip import protocol
from services.runtime.rpc.access import Access
from services.runtime.rpc.rpc import Answer, Failure, Metadata
from services.runtime.telemetry import worker_spans
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.spans import Value
from services.runtime.telemetry.tracing import Tracer, untraced

log = logging.getLogger(__name__)

_RENEWAL_SECONDS = 30.0
# Seconds before each run of an ensemble, as long as its steps are replaced. Together longer than a poll of the fleet.
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4)
# Outcomes of answers that were stored in the local tier.
_FILLS = frozenset(("miss", "hit-shared", "hit-peer"))


class RequestPath:
    """Answers requests from the caches; computes each missing answer once, on the fleet.

    Its coroutines must be driven (services/runtime/driver.py).
    """

    def __init__(
        self,
        fleet: Workers,
        mesh: Mesh,
        hasher: RequestHasher,
        dispatcher: Dispatcher,
        tracer: Tracer,
        accounts: Accounts,
        replies: Replies,
        quotas: Quotas,
        audit: Audit,
        access: Access,
        limits: TenantLimits | None = None,
    ) -> None:
        self._budgets = accounts.budgets
        self._limits = limits
        self._fleet = fleet
        self._access = access
        self._mesh = mesh
        self._dispatcher = dispatcher
        self._tracer = tracer
        self._requests = accounts.requests
        self._replies = replies
        self._quotas = quotas
        self._keyer = Keyer(fleet, mesh.purges, hasher, audit)
        self._local = LocalAnswers(mesh, self._renewal)
        self._rows = RowCache(mesh, hasher, limits)
        self._semantic = SemanticMatches(mesh, hasher, self._embed)
        self._sequences = KeyedLock()
        # By ensemble, the catalog that had another version of a step than its worker, however long the router waited.
        self._mixed: dict[str, Catalog] = {}

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        return self._keyer.samples()

    def infer(self, data: bytes, metadata: Metadata, deadline: float | None) -> Coroutine[Any, Any, Answer | Failure]:
        """The fast path of ModelInfer."""
        return self.answer(self.open(data, metadata, deadline, "ModelInfer"))

    def open(self, data: bytes, metadata: Metadata, deadline: float | None, method: str) -> Call:
        """Makes the call of a received request; `deadline` in time.monotonic."""
        sent = protocol.caller_metadata(metadata)
        protocol.identify(sent, self._access)
        call = Call(data, self._tracer.start(sent.traceparent), metadata, method, deadline)
        call.caller_metadata = sent
        return call

    async def answer(self, call: Call) -> Answer | Failure:
        """Runs the whole path; also stores a failure in `call.error`. Up to the local tier it waits for nothing.

        Cancelled: counts the call as cancelled.
        """
        try:
            self._keyer.admit(call)
            if self._budgets.limits:
                self._budgets.check(call.tenant, call.name)
            if self._limits is not None:
                self._limits.bytes.take(call.caller, len(call.data))
            entry = self._local.get(call)
            if entry is not None:
                self._keyer.remember(call)
                return self._replies.answer(call, Found(entry, "hit-local"))
            self._refuse(call)
            call.router_ns = time.time_ns() - call.start
            await ON_LOOP
            if self._limits is not None:
                self._limits.concurrency.begin(call.caller)
            self._requests.in_flight += 1
            try:
                found = await self._find(call)
            finally:
                self._requests.in_flight -= 1
                if self._limits is not None:
                    self._limits.concurrency.end(call.caller)
            self._kept(call, found)
            return self._replies.answer(call, found)
        except DeadlinePassed:
            call.error = DeadlineExceededError("the deadline passed before the answer was computed")
        except asyncio.CancelledError:
            self._replies.left(call)
            raise
        except Exception as error:
            call.error = faults.reported(log, f"{call.name} failed", error, call.trace.trace_id)
        return self._replies.failure(call, call.error)

    def _kept(self, call: Call, found: Found) -> None:
        """Counts an answer that is in the local tier now for its tenant."""
        if self._limits is not None and found.outcome in _FILLS and call.key:
            self._limits.cache.keep(call.tenant, call.key, len(found.entry.value))

    def _refuse(self, call: Call) -> None:
        """Raises RefusedError if the answer must be computed and no worker has capacity for it."""
        model = call.model
        assert model is not None
        if call.ring_hash or call.control is not None or model.plan is not None or model.row_cache:
            return
        if call.request_hash:
            key = self._mesh.purges.epochs.key(model.digest, model.name, call.request_hash)
            if model.semantic_threshold or not self._mesh.must_compute(key):
                return
        refused = self._dispatcher.refusal(model, call.caller)
        if refused is not None:
            raise refused

    def _find(self, call: Call) -> Coroutine[Any, Any, Found]:
        """Answers a call after a miss in the local tier."""
        model, control = call.model, call.control
        assert model is not None
        # The key uses the epochs from before the computation, so an invalidation during it also covers this answer.
        epochs = self._mesh.purges.epochs
        if not call.request_hash:
            return self._bypass(call, model, epochs)
        call.key = key = epochs.key(model.digest, model.name, call.request_hash)
        if control is not None:
            return controlled.find(self._mesh, call, model, control, lambda: self._compute(call, model, epochs))
        # If this key was invalidated on its own, the cached rows would restore the invalidated answer.
        if model.row_cache and key.endswith(call.request_hash):
            return self._by_row(call, model, epochs)
        return self._whole(call, model, epochs)

    async def _bypass(self, call: Call, model: ModelEntry, epochs: Epochs) -> Found:
        """Computes an answer that is not cacheable."""
        if call.control is not None and call.control.only_if_cached:
            raise FailedPreconditionError(
                "such an answer is never cached, and cache-control is only-if-cached", kind="not_cached"
            )
        if call.ring_hash:
            owner = ""
            if self._access.is_closed:
                owner = call.tenant
                call.data = protocol.of_tenant(call.data, owner)
            # Keeps the requests of a sequence in order: two envelopes may overtake each other.
            async with self._sequences.hold((call.ring_hash, owner)):
                computed = await self._compute(call, model, epochs)
        else:
            computed = await self._compute(call, model, epochs)
        return Found(computed.entry, "bypass", computed.worker, model_digest=computed.model_digest)

    async def _by_row(self, call: Call, model: ModelEntry, epochs: Epochs) -> Found:
        """Answers a batch row by row if it can be split into rows, else as a whole."""

        async def compute(data: bytes, request_hash: bytes) -> tuple[Result, str]:
            joins = epochs.key(model.digest, model.name, request_hash) if request_hash else b""
            result, member = await driver.run(self._forward(call, model, data, request_hash, joins))
            call.provider = result.timing.provider
            return result, member.worker_id

        batch = rows.split(v2.ModelInferRequest.FromString(call.data), model.max_request_rows)
        if batch is not None:
            start = time.time_ns()
            tenant = call.tenant if model.tenant_scoped else None
            found = await self._rows.find(batch, model, tenant, epochs, call.key, call.subject(), compute, call.tenant)
            if found is not None:
                call.trace.span("cache.rows", start, time.time_ns(), {"ringmesh.rows.known": found.rows})
                return found
        return await self._whole(call, model, epochs)

    def _whole(self, call: Call, model: ModelEntry, epochs: Epochs) -> Coroutine[Any, Any, Found]:
        if model.semantic_threshold:
            return self._semantic.find(call, model, epochs, lambda: self._join(call, model, epochs))
        return self._join(call, model, epochs)

    async def _join(self, call: Call, model: ModelEntry, epochs: Epochs) -> Found:
        """Answers the call together with equal calls in flight: from the shared tier, a peer or a worker."""
        while True:
            entry = self._local.get_again(call, model.freshness)
            if entry is not None:
                return Found(entry, "hit-local")
            flight, joined = self._mesh.get_or_compute(
                call.key, lambda: self._compute(call, model, epochs), call.trace, call.subject(), model.freshness
            )
            # A call that joined another retries if the other failed for a reason of its own: the quota or deadline of
            # its caller, or another row of its batch.
            try:
                found = await flight
                if not joined:
                    return found
                return Found(found.entry, "joined", found.worker, model_digest=found.model_digest)
            except RefusedError as refused:
                if refused.caller == call.caller:
                    raise
            except DeadlineExceededError:
                if not joined or call.is_late():
                    raise
            except rows.RowFailedError as failed:
                rows.raise_fatal(failed)

    async def _compute(self, call: Call, model: ModelEntry, epochs: Epochs) -> Computed:
        """Computes the answer on a worker, or step by step for an ensemble that no worker runs whole."""
        if model.plan is not None and not self._runs_whole(model):
            self._take_quota(call)
            return await self._by_step(call, model, epochs)
        # With no-cache the request must not join another on the worker either.
        joins = b"" if call.control is not None and call.control.no_cache else call.key
        ring_hash = call.ring_hash or call.request_hash
        start = time.monotonic()
        result, member = await self._forward(call, model, call.data, ring_hash, joins)
        timing = result.timing
        call.provider = timing.provider
        if call.failed is not None:
            self._replies.computed_late(call)
        entry = Entry(result.response, int(timing.share_us))
        took = time.monotonic() - start
        key = _key(call, model, epochs) if result.model_digest == model.digest else None
        return Computed(entry, key, member.worker_id, model.freshness, took, result.model_digest)

    def _forward(
        self, call: Call, model: ModelEntry, data: bytes, ring_hash: bytes, joins: bytes
    ) -> Coroutine[Any, Any, DispatchResult]:
        """`ring_hash`: b"": any worker. `joins`: key that equal requests share on the worker (b"": none)."""
        self._take_quota(call)
        return self._dispatcher.run(
            DispatchRequest(
                model, data, ring_hash, call.trace, request_hash=joins, deadline=call.deadline, caller=call.caller
            )
        )

    def _take_quota(self, call: Call) -> None:
        # Steps and renewals are internal requests, which no quota limits.
        if call.method != STEP:
            self._quotas.take(call.caller)

    def _renewal(self, call: Call) -> Compute:
        """Returns a function that recomputes the answer to `call` as work of the router's own."""
        model = call.model
        assert model is not None

        def compute() -> Coroutine[Any, Any, Computed]:
            again = Call(call.data, untraced(), call.metadata, STEP, time.monotonic() + _RENEWAL_SECONDS)
            again.request_hash, again.tenant, again.caller = call.request_hash, call.tenant, ROUTER
            epochs = self._mesh.purges.epochs
            again.key = epochs.key(model.digest, model.name, again.request_hash)
            return self._compute(again, model, epochs)

        return compute

    def _runs_whole(self, model: ModelEntry) -> bool:
        """Whether one worker runs the ensemble: a worker can, and its steps need not be cached one by one."""
        members = self._fleet.view.members.values()
        return not model.cache_steps and any(member.can_run(model) for member in members)

    async def _by_step(self, call: Call, model: ModelEntry, epochs: Epochs) -> Computed:
        """Runs an ensemble step by step. Its answer is as old as the oldest step that has a time to live.

        If a step was replaced meanwhile, runs it again, with the steps that the router knows by then: an answer must
        not mix old and new steps, except while workers hold different versions of one, as in a rolling update. It is
        cached only if a run had exactly the steps of its key.
        """
        start, asked, catalog = time.monotonic(), model.digest, self._fleet.view.catalog
        key: bytes | None = None
        for pause in _PAUSES:
            if pause:
                await in_task(asyncio.sleep(pause))
                with suppress(RingmeshError):  # this version may be unloaded by now
                    now = self._fleet.view.catalog.find(model.name, model.version)
                    model = now if now.plan is not None else model
            assert model.plan is not None
            ages: list[int] = []
            ran: set[bytes] = set()
            infer = partial(self._run_step, call, ages, ran)
            try:
                entry = await in_task(ensembles.run(model, model.plan, call.data, infer))
            except InvalidArgumentError as error:
                error.model_digest = error.model_digest or model.digest
                raise
            entry.created_at_ms = min(ages, default=entry.created_at_ms)
            if ran == model.step_digests:
                key = _key(call, model, epochs) if model.digest == asked else None
                break
            if self._mixed.get(model.name) is self._fleet.view.catalog:
                break
        else:
            if self._fleet.view.catalog is catalog:
                self._mixed = {name: of for name, of in self._mixed.items() if of is catalog} | {model.name: catalog}
        return Computed(entry, key, "", model.freshness, time.monotonic() - start)

    async def _run_step(self, whole: Call, ages: list[int], ran: set[bytes], data: bytes) -> Entry:
        return await driver.run(self._step(data, whole, ages, ran))

    async def _embed(self, data: bytes, whole: Call) -> tuple[Entry, bytes]:
        """Runs an embedding model. Returns also the digest of the version that ran."""
        ran: set[bytes] = set()
        entry = await self._step(data, whole, [], ran)
        return entry, ran.pop()

    async def _step(self, data: bytes, whole: Call, ages: list[int], ran: set[bytes]) -> Entry:
        """Runs an internal request as part of `whole`. Adds the digest of the version that answered to `ran`, and if
        the answer expires, its creation time to `ages`."""
        call = Call(data, whole.trace.child(), whole.metadata, STEP, whole.deadline)
        call.tenant, call.caller, call.control = whole.tenant, whole.caller, whole.control
        attributes: dict[str, Value] = {}
        message = "it was ended"
        try:
            self._keyer.key(call)
            entry = self._local.get(call)
            found = Found(entry, "hit-local") if entry is not None else await self._find(call)
            self._kept(call, found)
            attributes["ringmesh.cache.outcome"] = found.outcome
            message = ""
        except RingmeshError as error:
            message = error.message
            raise
        finally:
            attributes["ringmesh.model.name"] = call.name
            attributes["ringmesh.model.version"] = call.model.version if call.model is not None else ""
            whole.trace.span(
                worker_spans.STEP, call.start, time.time_ns(), attributes, call.trace.span_id, error=message
            )
        if afterwards := self._replies.count(call, found):
            afterwards()
        assert call.model is not None
        ran.add(found.model_digest or call.model.digest)
        if call.model.freshness is not None:
            ages.append(found.entry.created_at_ms)
        return found.entry


def _key(call: Call, model: ModelEntry, epochs: Epochs) -> bytes | None:
    """The key of an answer of the version for which the request was hashed. Another version's answer has none: the hash
    depends on the model's outputs, and on whether its tenants share answers."""
    return epochs.key(model.digest, model.name, call.request_hash) if call.request_hash else None
