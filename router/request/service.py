"""`inference.GRPCInferenceService` on the router: the path of a request."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher, UncacheableError
from cache.keys.request_memo import LARGEST_BYTES, RequestMemo
from cache.mesh import Computed, Found, Mesh, Renewal
from cache.policy.cache_control import parse_cache_control
from cache.semantic.semantic_tier import SemanticTier
from cache.tiers.entry import Entry
from router.accounting.request_metrics import STEP, RequestMetrics
from router.admission.caller import ROUTER, RefusedError, caller_of
from router.admission.quotas import Quotas
from router.balancing.catalog import Catalog, ModelEntry
from router.dispatch.dispatcher import Dispatcher
from router.membership.fleet import Fleet
from router.request import ensembles, rows
from router.request import semantic as similar
from router.request.audit import Audit
from router.request.call import Admitted
from router.request.miss import Misses, as_computed
from router.request.replies import Replies
from router.request.rows import RowCache
from services.runtime import faults
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    RingmeshError,
    UnavailableError,
)
from services.runtime.keyed_lock import KeyedLock
from services.runtime.large_result import Result
from services.runtime.oip import protocol
from services.runtime.oip.infer_request import RequestReader
from services.runtime.oip.request_check import check_request
from services.runtime.oip.stream_infer import stream_handler
from services.runtime.rpc.rpc import (
    Answer,
    Context,
    Failure,
    Handler,
    Lane,
    Metadata,
    Service,
    unary,
)
from services.runtime.telemetry import worker_spans
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import forgotten
from services.runtime.telemetry.spans import Value
from services.runtime.telemetry.tracing import Tracer, untraced

log = logging.getLogger(__name__)

# Requests whose meaning is remembered, at about 300 bytes each.
_REMEMBERED = 32_768
_RENEWAL_SECONDS = 30.0


class InferenceService:
    """Answers from the mesh what the fleet has computed before, and has the rest computed once."""

    def __init__(
        self,
        fleet: Fleet,
        mesh: Mesh,
        hasher: RequestHasher,
        dispatcher: Dispatcher,
        tracer: Tracer,
        requests: RequestMetrics,
        replies: Replies,
        quotas: Quotas,
        audit: Audit,
    ) -> None:
        self._fleet = fleet
        self._mesh = mesh
        self._hasher = hasher
        self._dispatcher = dispatcher
        self._tracer = tracer
        self._requests = requests
        self._replies = replies
        self._quotas = quotas
        self._audit = audit
        self._rows = RowCache(mesh, hasher)
        self._memo = RequestMemo[_Meaning](_REMEMBERED)
        self._reader = RequestReader()
        self._semantic = SemanticTier(mesh.shared)
        self._sequences = KeyedLock()
        self._misses = Misses(mesh, dispatcher, quotas, replies, requests)

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield forgotten("requests", self._memo.meanings)

    def service(self, is_ready: protocol.ReadyCheck, more: Mapping[str, Handler]) -> Service:
        """The handlers, to be served with `more` of the same service. `is_ready` answers ServerReady."""
        return protocol.service(
            is_ready,
            {
                "ModelReady": unary(v2.ModelReadyRequest, self._model_ready),
                "ModelMetadata": unary(v2.ModelMetadataRequest, self._model_metadata),
                "ModelStreamInfer": stream_handler(self._stream_infer),
                **more,
            },
            {"ModelInfer": Lane(self._admit_or_refuse, self._finish, self._misses.begin)},
        )

    async def _model_ready(self, request: v2.ModelReadyRequest, _: Context) -> v2.ModelReadyResponse:
        return v2.ModelReadyResponse(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, name: str, version: str) -> bool:
        try:
            model = self._fleet.view.catalog.find(name, version)
        except (NotFoundError, UnavailableError):
            return False
        if model.not_runnable:
            return False
        if any(not member.why_not(model) for member in self._fleet.view.members.values()):
            return True
        steps = model.plan.steps if model.plan is not None else ()
        return bool(steps) and all(
            self._is_ready(step.model, step.version)  # compiled: a step is never an ensemble, see Catalog
            for step in steps
        )

    async def _model_metadata(self, request: v2.ModelMetadataRequest, _: Context) -> v2.ModelMetadataResponse:
        return self._fleet.view.catalog.find(request.name, request.version).metadata

    def _admit(self, data: bytes, metadata: Metadata, method: str = "ModelInfer") -> Answer | Admitted:
        """Parses, keys and looks into the local tier: a hit is answered without serializing a message."""
        told = protocol.told(metadata)
        call = Admitted(data, self._tracer.start(told.traceparent), metadata, method)
        try:
            call.caller = caller_of(told)
            call.tenant = told.tenant
            if told.control:
                call.control = parse_cache_control(told.control)
        except RingmeshError as error:
            call.error = error
            return call
        digest = b""
        catalog, epochs = self._fleet.view.catalog, self._mesh.purges.epochs
        meaning = None
        if call.control is None and len(data) <= LARGEST_BYTES and not self._audit.distrusted:
            digest = self._memo.digest(data, call.tenant)
            meaning = self._memo.get(digest)
        if meaning is not None and meaning.catalog is catalog and meaning.epochs is epochs:
            call.model, call.request_id, call.request_hash = meaning.model, meaning.request_id, meaning.request_hash
            call.name = meaning.model.name
            digest = b""
        else:
            self._key(call)
        entry = self._local(call)
        if digest and entry is not None and call.model is not None:
            # What nobody asks for again would only take room.
            self._memo.put(digest, _Meaning(catalog, epochs, call.model, call.request_id, call.request_hash))
        if entry is None:
            call.error = call.error or self._refusal(call)
            return call
        return self._replies.answer(call, Found(entry, "hit-local"))

    def _admit_or_refuse(self, data: bytes, metadata: Metadata) -> Answer | Failure | Admitted:
        """As `_admit`; what is refused for want of room is so here, where it costs least."""
        call = self._admit(data, metadata)
        if not isinstance(call, Admitted) or not isinstance(refused := call.error, RefusedError):
            return call
        return self._replies.failure(call, refused)

    def _refusal(self, call: Admitted) -> RingmeshError | None:
        """Where only computing can answer, and nobody has room for it; None where that is to be seen on the way."""
        model = call.model
        assert model is not None
        if call.place or call.control is not None or model.plan is not None or model.row_cache:
            return None
        if call.request_hash:
            key = self._mesh.purges.epochs.key(model.digest, model.name, call.request_hash)
            if model.semantic_threshold or not self._mesh.must_compute(key):
                return None
        return self._dispatcher.refusal(model, call.caller)

    def _key(self, call: Admitted) -> None:
        """Parses, finds the model and keys; what is wrong is in `error`."""
        try:
            read = self._reader.read(call.data)
            call.name, call.request_id = read.head.name, read.request_id
            call.model = model = self._fleet.view.catalog.find(call.name, read.head.version)
            if model.not_runnable:
                raise FailedPreconditionError(f"ensemble {model.name!r} cannot run: {model.not_runnable}")
            if read.head.checked is not model:
                check_request(read.head.message, model.name, model.inputs, model.outputs)
                read.head.checked = model
            if model.uncacheable or self._audit.distrusted:
                why_not = model.uncacheable or self._audit.why_not(model, self._fleet.view.catalog)
                if why_not:
                    raise UncacheableError(why_not)
            tenant = call.tenant if model.tenant_scoped else None
            call.request_hash = self._hasher.hash_read(read, model.outputs, tenant)
        except UncacheableError as why:
            if sequence := protocol.sequence_of(read.head.message):
                call.place = self._hasher.sequence_place(call.name, sequence)
            call.reason = str(why)
        except Exception as error:
            call.error = faults.told(log, f"{call.name} failed", error, call.trace.trace_id)

    def _local(self, call: Admitted) -> Entry | None:
        """What the local tier has."""
        if not call.request_hash or call.model is None:
            return None
        if call.control is not None and call.control.no_cache:
            return None
        purges = self._mesh.purges
        model = call.model
        key = purges.epochs.key(model.digest, model.name, call.request_hash)
        entry = self._mesh.local.get(key)
        if entry is not None:
            if entry.created_at_ms < purges.oldest_ms:
                entry = None
            elif call.control is not None:
                entry = entry if self._takes(call, model, entry) else None
            elif model.freshness is not None and not self._is_usable(call, model, key, entry):
                entry = None
        if entry is None:
            call.trace.span("cache.local", call.start, time.time_ns(), {"ringmesh.cache.hit": False})
        return entry

    def _takes(self, call: Admitted, model: ModelEntry, entry: Entry) -> bool:
        """Whether the caller's cache-control does, which nothing stale satisfies."""
        now_ms = time.time_ns() // 1_000_000
        if model.freshness is not None and model.freshness.is_stale(entry.created_at_ms, now_ms):
            return False
        return call.control is None or call.control.takes(entry.created_at_ms, now_ms)

    def _is_usable(self, call: Admitted, model: ModelEntry, key: bytes, entry: Entry) -> bool:
        """Whether its age lets an answer be given. One whose time soon is over is computed anew off the path."""
        now_ms = call.start // 1_000_000
        freshness = model.freshness
        if freshness is None or freshness.is_young(entry.created_at_ms, now_ms):
            return True
        if freshness.is_over(entry.created_at_ms, now_ms):
            return False
        call.stale = freshness.is_stale(entry.created_at_ms, now_ms)
        if self._mesh.is_due(key, entry, freshness, now_ms) and (renewal := self._renewal(call, model)):
            call.renew = lambda: self._mesh.renew(key, entry, renewal)
        return True

    def _renewal(self, call: Admitted, model: ModelEntry) -> Renewal | None:
        """None where answers have no end. It is computed for no caller, and joined with who does it for one."""
        if model.freshness is None:
            return None

        async def compute() -> Computed:
            again = Admitted(call.data, untraced(), call.metadata, STEP)
            again.request_hash, again.tenant, again.caller = call.request_hash, call.tenant, ROUTER
            deadline = time.monotonic() + _RENEWAL_SECONDS
            return await self._compute(again, model, again.request_hash, deadline, self._mesh.purges.epochs)

        return Renewal(model.freshness, compute)

    async def _finish(self, call: Admitted, deadline: float | None) -> Answer | Failure:
        """What the local tier could not answer. A failure is in `error` of the call too."""
        self._requests.in_flight += 1
        try:
            # What is under way for others goes on.
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                found = await self._find(call, deadline)
            if call.model is not None and call.model.freshness is not None:
                call.stale = call.model.freshness.is_stale(found.entry.created_at_ms, time.time_ns() // 1_000_000)
            return self._replies.answer(call, found)
        except asyncio.CancelledError:
            self._replies.left(call)
            raise
        except TimeoutError:
            call.error = DeadlineExceededError("the deadline passed before the answer was computed")
        except Exception as error:
            call.error = faults.told(log, f"{call.name} failed", error, call.trace.trace_id)
        finally:
            self._requests.in_flight -= 1
        return self._replies.failure(call, call.error)

    async def _stream_infer(self, data: bytes, context: Context) -> Answer:
        admitted = self._admit(data, protocol.metadata(context), "ModelStreamInfer")
        if isinstance(admitted, Answer):
            answer: Answer | Failure = admitted
        else:
            answer = await self._finish(admitted, protocol.deadline(context))
        if answer.afterwards is not None:
            answer.afterwards()
        if isinstance(admitted, Admitted) and admitted.error is not None:
            raise admitted.error
        assert isinstance(answer, Answer)
        return answer

    async def _find(self, call: Admitted, deadline: float | None) -> Found:
        """What the local tier did not have."""
        if call.error is not None:
            raise call.error
        model = call.model
        assert model is not None
        if call.control is not None and call.control.only_if_cached and not call.request_hash:
            raise FailedPreconditionError(
                "such an answer is never cached, and cache-control is only-if-cached", kind="not_cached"
            )
        # An answer is filed by the purges that were when its computing began.
        epochs = self._mesh.purges.epochs
        if call.place:
            # A sequence is in order here too: two envelopes may overtake each other.
            async with self._sequences.hold(call.place):
                computed = await self._compute(call, model, call.place, deadline, epochs)
            return Found(computed.entry, "bypass", computed.worker)
        if not call.request_hash:
            computed = await self._compute(call, model, b"", deadline, epochs)
            return Found(computed.entry, "bypass", computed.worker)
        key = epochs.key(model.digest, model.name, call.request_hash)
        # Where the answer itself was purged by its key, its rows would bring it back.
        if model.row_cache and call.control is None and key.endswith(call.request_hash):
            found = await self._find_rows(call, model, deadline, epochs, key)
            if found is not None:
                return found

        async def compute() -> Computed:
            return await self._compute(call, model, call.request_hash, deadline, epochs)

        if call.control is not None:
            return await self._mesh.get_or_compute_as_told(key, compute, call.control, call.trace, model.freshness)
        asked = await self._asked(call, model, deadline) if model.semantic_threshold else None
        if asked is None:
            return await self._find_exact(call, model, key, compute, deadline)
        question, space = asked
        tenant = call.tenant if model.tenant_scoped else None
        (kind,) = self._hasher.hash_rows(
            question.request, [[b""] * len(question.request.inputs)], model.outputs, tenant
        )
        group = model.digest + kind + space + epochs.version.to_bytes(8, "little")
        found = await self._find_similar(call, model, group, question, key)
        if found is None:
            found = await self._find_exact(call, model, key, compute, deadline)
            self._semantic.add(group, question.vector, key)
        return found

    async def _asked(
        self, call: Admitted, model: ModelEntry, deadline: float | None
    ) -> tuple[similar.Question, bytes] | None:
        """What it asks, and the digest of the embedding model that says so, b"" without one.

        None where it is no single vector; also where the embedding failed: then it is computed, as it would be anyway.
        """
        request = v2.ModelInferRequest.FromString(call.data)
        if not model.semantic_embedding:
            question = similar.question(request)
            return None if question is None else (question, b"")
        data = similar.to_embed(request, model.semantic_embedding)
        if data is None:
            return None
        try:
            space = self._fleet.view.catalog.find(model.semantic_embedding, "").digest
            answer = await self._run_step(data, call, deadline, [])
        except RingmeshError as error:
            log.info("model %s: what is similar is not known: %s", model.name, error.message)
            return None
        question = similar.embedded(request, answer.value)
        return None if question is None else (question, space)

    async def _find_similar(
        self, call: Admitted, model: ModelEntry, group: bytes, question: similar.Question, key: bytes
    ) -> Found | None:
        """The answer to a request near enough; but the right one where the shared tier has it."""
        near = await self._semantic.nearest(group, question.vector, model.semantic_threshold)
        if near is None or near.key == key:
            return None
        exact = await self._mesh.look_up(key, call.trace)
        if exact is not None and self._takes(call, model, exact):
            return Found(exact, "hit-shared")
        entry = await self._mesh.find(near.key)
        if entry is None or not self._takes(call, model, entry):
            return None
        return Found(entry, "hit-semantic", similarity=near.similarity)

    async def _find_exact(
        self,
        call: Admitted,
        model: ModelEntry,
        key: bytes,
        compute: Callable[[], Awaitable[Computed]],
        deadline: float | None,
    ) -> Found:
        renewal = self._renewal(call, model)
        while True:
            try:
                return await self._mesh.get_or_compute(key, compute, deadline, call.trace, renewal)
            except RefusedError as refused:
                # Where it joined another caller's request, the refusal was not meant for it.
                if refused.caller == call.caller:
                    raise
            except rows.RowFailedError as failed:
                rows.raise_fatal(failed)  # else it was the failure of a batch that has the same row

    async def _find_rows(
        self, call: Admitted, model: ModelEntry, deadline: float | None, epochs: Epochs, key: bytes
    ) -> Found | None:
        """A batch, row by row; None where it is none, or must be computed whole."""
        batch = rows.split(v2.ModelInferRequest.FromString(call.data), model.max_request_rows)
        if batch is None:
            return None

        async def compute(data: bytes, request_hash: bytes) -> tuple[Result, str]:
            self._quotas.take(call.caller)
            result, member = await self._dispatcher.run(
                model,
                data,
                request_hash,
                call.trace,
                request_hash=epochs.key(model.digest, model.name, request_hash) if request_hash else b"",
                deadline=deadline,
                caller=call.caller,
            )
            call.provider = result.timing.provider
            return result, member.worker_id

        start = time.time_ns()
        tenant = call.tenant if model.tenant_scoped else None
        found = await self._rows.find(batch, model, tenant, epochs, key, compute)
        if found is not None:
            call.trace.span("cache.rows", start, time.time_ns(), {"ringmesh.rows.known": found.rows})
        return found

    async def _compute(
        self, call: Admitted, model: ModelEntry, place: bytes, deadline: float | None, epochs: Epochs
    ) -> Computed:
        """`place` says where on the ring, b"" that any will do."""
        if call.method != STEP:
            self._quotas.take(call.caller)
        if model.plan is not None and not self._runs_whole(model):
            ages: list[int] = []
            entry = await ensembles.run(
                model, model.plan, call.data, lambda data: self._run_step(data, call, deadline, ages)
            )
            entry.created_at_ms = min(ages, default=entry.created_at_ms)
            key = epochs.key(model.digest, model.name, call.request_hash) if call.request_hash else None
            return Computed(entry, key, "", model.freshness)
        # What is to be computed anew joins nothing on the worker either.
        may_join = call.request_hash and (call.control is None or not call.control.no_cache)
        joins = epochs.key(model.digest, model.name, call.request_hash) if may_join else b""
        result, member = await self._dispatcher.run(
            model,
            call.data,
            place,
            call.trace,
            request_hash=joins,
            deadline=deadline,
            caller=call.caller,
        )
        return as_computed(call, model, epochs, result, member)

    def _runs_whole(self, model: ModelEntry) -> bool:
        """Whether an ensemble is run by one worker: one holds all steps, and they are not to be cached each."""
        members = self._fleet.view.members.values()
        return not model.cache_steps and any(not member.why_not(model) for member in members)

    async def _run_step(self, data: bytes, whole: Admitted, deadline: float | None, ages: list[int]) -> Entry:
        """The step's answer; where it has a time to live, the whole is as old as that."""
        call = Admitted(data, whole.trace.child(), whole.metadata, STEP)
        call.tenant, call.caller, call.control = whole.tenant, whole.caller, whole.control
        self._key(call)
        version = call.model.version if call.model is not None else ""
        told: dict[str, Value] = {"ringmesh.model.name": call.name, "ringmesh.model.version": version}
        message = "it was ended"
        try:
            entry = self._local(call)
            found = Found(entry, "hit-local") if entry is not None else await self._find(call, deadline)
            told["ringmesh.cache.outcome"] = found.outcome
            message = ""
        except RingmeshError as error:
            message = error.message
            raise
        finally:
            whole.trace.span(worker_spans.STEP, call.start, time.time_ns(), told, call.trace.span_id, error=message)
        if afterwards := self._replies.count(call, found):
            afterwards()
        if call.model is not None and call.model.freshness is not None:
            ages.append(found.entry.created_at_ms)
        return found.entry


class _Meaning:
    """What the bytes of a request say, by a catalog and the purges."""

    __slots__ = ("catalog", "epochs", "model", "request_hash", "request_id")

    def __init__(
        self, catalog: Catalog, epochs: Epochs, model: ModelEntry, request_id: str, request_hash: bytes
    ) -> None:
        self.catalog = catalog
        self.epochs = epochs
        self.model = model
        self.request_id = request_id
        self.request_hash = request_hash
