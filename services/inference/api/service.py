"""The worker's gRPC services: the v2 protocol for callers, the envelope for routers."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.models.decisions import request_of
from services.inference.models.ensemble import Ensemble
from services.inference.models.held_models import HeldModel
from services.inference.worker import Work, Worker
from services.runtime import faults, w3c, wire
from services.runtime.driver import ON_LOOP, in_task
from services.runtime.errors import NotFoundError, RingmeshError, UnavailableError, from_failure
from services.runtime.large_result import LargeResult, Result, message_of, pieces_of
from services.runtime.oip import protocol
from services.runtime.oip.absent_model import Failures
from services.runtime.oip.infer_request import model_name, request_id
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.oip.stream_infer import stream_handler
from services.runtime.request_limits import check_list
from services.runtime.rpc.calls import Calls
from services.runtime.rpc.rpc import (
    Answer,
    Context,
    Failure,
    Handler,
    Metadata,
    Service,
    failure,
    parse,
    unary,
)
from services.runtime.telemetry.load_report import LoadReport
from services.runtime.telemetry.tracing import Tracer
from services.runtime.telemetry.worker_spans import EXECUTE

log = logging.getLogger(__name__)

# Of failed loads, in a description; the index has them all.
_MOST_FAILURES = 1000
_LONGEST_REASON = 300
_DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["InferenceWorkerService"]


class InferenceService:
    """`inference.GRPCInferenceService`, straight at this worker: nothing is cached here."""

    def __init__(self, worker: Worker, tracer: Tracer, report: LoadReport) -> None:
        self._worker = worker
        self._tracer = tracer
        self._report = report

    def service(self, is_ready: protocol.ReadyCheck, more: Mapping[str, Handler], calls: Calls) -> Service:
        """The handlers, to be served with `more` of the same service; `calls` are counted. `is_ready` answers
        ServerReady."""
        return protocol.service(
            is_ready,
            {
                "ModelReady": unary(v2.ModelReadyRequest, self._model_ready),
                "ModelMetadata": unary(v2.ModelMetadataRequest, self._model_metadata),
                "ModelStreamInfer": stream_handler(self._stream_infer),
                **more,
            },
            {"ModelInfer": calls.counted_path(protocol.full_name("ModelInfer"), self._model_infer)},
        )

    async def _model_ready(self, request: v2.ModelReadyRequest, _: Context) -> v2.ModelReadyResponse:
        try:
            held = self._worker.store.held.find(request.name, request.version)
        except (NotFoundError, UnavailableError):
            return v2.ModelReadyResponse(ready=False)
        return v2.ModelReadyResponse(ready=not held.model.not_runnable)

    async def _model_metadata(self, request: v2.ModelMetadataRequest, _: Context) -> v2.ModelMetadataResponse:
        metadata = v2.ModelMetadataResponse()
        metadata.CopyFrom(self._worker.store.held.find(request.name, request.version).model.metadata())
        metadata.versions[:] = self._worker.store.held.versions(request.name)
        return metadata

    async def _execute(self, data: bytes, metadata: Metadata, deadline: float | None, method: str) -> Result:
        trace = self._tracer.start(protocol.traceparent(metadata))
        trace.span_id = w3c.new_span_id()
        start = time.time_ns()
        result = await self._worker.execute(
            data,
            request_hash=b"",
            deadline=deadline,
            trace_context=bytes.fromhex(trace.trace_id + trace.span_id),
        )
        if self._tracer.ratios:
            self._tracer.sample(trace, model_name(data))
        if trace.sampled or result.HasField("failure"):
            name, failure = protocol.full_name(method), result.failure
            attributes = protocol.span_attributes(method, failure.code)
            self._tracer.finish(trace, name, start, time.time_ns(), attributes, failure.message, result.timing)
        return result

    async def _model_infer(self, data: bytes, metadata: Metadata, deadline: float | None) -> Answer | Failure:
        await ON_LOOP
        result = await in_task(self._execute(data, metadata, deadline, "ModelInfer"))
        trailing = (
            ("ringmesh-cache", "bypass"),
            ("ringmesh-worker", self._worker.worker_id),
            self._report.trailer,
        )
        if result.HasField("failure"):
            return failure(from_failure(result.failure), trailing)
        provider = ("ringmesh-provider", result.timing.provider)
        return protocol.answered(result.response, request_id(data), (*trailing, provider))

    async def _stream_infer(self, data: bytes, context: Context) -> Answer:
        metadata, deadline = protocol.metadata(context), protocol.deadline(context)
        result = await self._execute(data, metadata, deadline, "ModelStreamInfer")
        if result.HasField("failure"):
            raise from_failure(result.failure)
        return protocol.answered(result.response, request_id(data), ())


@dataclass(frozen=True, slots=True)
class Locality:
    """Where a worker stands, and its part of the keys against others'."""

    region: str
    zone: str
    weight: float


class EnvelopeService:
    """`ringmesh.inference.v1.InferenceWorkerService`: many requests a call, and what is held here."""

    def __init__(self, worker: Worker, locality: Locality) -> None:
        self._worker = worker
        self._locality = locality
        # Where routers of this host hand envelopes in, "" while there is none, and the port that it serves on.
        self.socket = ""
        self.port = 0
        self._held = worker.store.held
        # Of two runs of a worker no version is the same.
        self._version = random.getrandbits(62) + 1

    def service(self, calls: Calls) -> Service:
        """The handlers, to be served; `calls` are counted."""
        execute = calls.counted_path(EXECUTE, self._execute)
        return Service(
            _DESCRIPTOR,
            {
                "Execute": fast_path_handler(execute),
                "Withdraw": unary(inference_pb2.WithdrawRequest, self._withdraw),
                "Describe": unary(inference_pb2.DescribeRequest, self._describe),
                "GetDecision": unary(inference_pb2.GetDecisionRequest, self._decision),
            },
            {"Execute": execute},
        )

    def begin(self, works: list[Work], done: Callable[[Answer | Failure], None]) -> Callable[[], None]:
        """What `admit` did not answer; `done` hears the answer, later than this returns. What cancels it."""
        return self._worker.begin_all(works, lambda results: done(self._answer(results)))

    def admit(self, data: bytes) -> Answer | Failure | list[Work]:
        """What is run at once is answered at once."""
        try:
            if not self._worker.accepting:
                raise UnavailableError("the worker is draining")
            check_list(data)
            request = parse(inference_pb2.ExecuteRequest, data)
        except RingmeshError as error:
            return failure(error)
        now = time.monotonic()
        works = [
            Work(
                item.request,
                item.request_hash,
                now + item.timeout_us / 1e6 if item.timeout_us else None,
                w3c.packed(item.traceparent),
            )
            for item in request.items
        ]
        results = self._worker.execute_at_once(works)
        if results is None:
            return works
        load = wire.field(2, self._load().SerializeToString())
        return Answer(b"".join([wire.field(1, result) for result in results]) + load, ())

    async def _execute(self, data: bytes, _: Metadata, __: float | None) -> Answer | Failure:
        admitted = self.admit(data)
        if isinstance(admitted, Answer | Failure):
            return admitted
        await ON_LOOP
        return self._answer(await self._worker.execute_all(admitted))

    def _answer(self, results: list[Result]) -> Answer | Failure:
        try:
            if any(isinstance(result, LargeResult) for result in results):
                return Answer(b"", (), None, pieces_of(results, self._load()))
            messages = [message_of(result) for result in results]
            response = inference_pb2.ExecuteResponse(results=messages, load=self._load())
            return Answer(response.SerializeToString(), ())
        except Exception as error:
            return failure(faults.internal(log, "an envelope failed", error))

    async def _withdraw(self, request: inference_pb2.WithdrawRequest, _: Context) -> inference_pb2.WithdrawResponse:
        return inference_pb2.WithdrawResponse(
            withdrawn=self._worker.withdraw(w3c.packed(traceparent) for traceparent in request.traceparents)
        )

    async def _describe(self, request: inference_pb2.DescribeRequest, _: Context) -> inference_pb2.DescribeResponse:
        load = self._load()
        known = request.known_version == load.version
        # A copy: a thread may be keeping another one.
        decided = () if known else [*self._worker.store.decisions.decided_ns]
        return inference_pb2.DescribeResponse(
            worker_id=self._worker.worker_id,
            accepting=self._worker.accepting,
            models=() if known else [describe(held) for held in self._held],
            load=load,
            version=load.version,
            region=self._locality.region,
            zone=self._locality.zone,
            weight=self._locality.weight,
            envelope_socket=self.socket,
            port=self.port,
            decisions=[self._decided(model) for model in decided],
            failed=[] if known else _failed(self._held.failures),
        )

    def _decided(self, model: str) -> inference_pb2.ModelDecision:
        decisions = self._worker.store.decisions
        return inference_pb2.ModelDecision(
            model=model, decided_unix_ns=decisions.decided_ns[model], fleet=model in decisions.fleet
        )

    async def _decision(
        self, request: inference_pb2.GetDecisionRequest, _: Context
    ) -> inference_pb2.GetDecisionResponse:
        decision = await asyncio.to_thread(self._worker.store.decisions.get, request.model)
        if decision is None:
            raise NotFoundError(f"nothing was decided about model {request.model!r}", field="model")
        return inference_pb2.GetDecisionResponse(
            decision=inference_pb2.ModelDecision(
                model=request.model, decided_unix_ns=decision.decided_ns, fleet=decision.fleet
            ),
            load=request_of(request.model, decision.overrides) if decision.loaded else None,
        )

    def announcement(self, address: str) -> inference_pb2.Announcement:
        """For routers that do not know of this worker yet, which they would reach at `address`."""
        return inference_pb2.Announcement(
            address=address,
            worker_id=self._worker.worker_id,
            region=self._locality.region,
            zone=self._locality.zone,
            weight=self._locality.weight,
            accepting=self._worker.accepting,
            models=[
                inference_pb2.HeldModel(name=held.model.name, version=str(held.model.version), digest=held.model.digest)
                for held in self._worker.store.held
            ],
        )

    def _load(self) -> inference_pb2.LoadReport:
        if self._held is not self._worker.store.held:
            self._held = self._worker.store.held
            self._version += 1
        load = self._worker.load
        return inference_pb2.LoadReport(
            requests=load.requests, estimated_wait_us=int(load.estimated_wait * 1e6), version=self._version
        )


def _failed(failures: Failures) -> list[inference_pb2.FailedVersion]:
    """What a router is told of models that failed to load."""
    told = [
        inference_pb2.FailedVersion(model=name, version=version, reason=reason[:_LONGEST_REASON])
        for name, versions in failures.items()
        for version, reason in versions.items()
    ]
    return told[:_MOST_FAILURES]


def describe(held: HeldModel) -> inference_pb2.ModelVersion:
    """What a router is told of a model."""
    model = held.model
    ensemble = None
    if isinstance(model, Ensemble):
        ensemble = inference_pb2.Ensemble(
            own_digest=model.own_digest, config=model.config(), not_runnable=model.not_runnable
        )
    return inference_pb2.ModelVersion(
        ensemble=ensemble,
        name=model.name,
        version=str(model.version),
        digest=model.digest,
        cacheable=model.cacheable,
        cacheable_reason=model.cacheable_reason,
        max_batch_rows=model.max_batch_rows,
        max_request_rows=model.max_request_rows,
        batch_remark=model.batch_remark,
        limits_queue=model.limits_queue,
        optional_inputs=[name for name in model.inputs if name not in model.required],
        provider=model.provider,
        metadata=model.metadata(),
        tenant_scoped=model.tenant_scoped,
        row_cache=model.row_cache,
        hedged=model.hedged,
        semantic_threshold=model.semantic_threshold,
        semantic_embedding=model.semantic_embedding,
        ttl_ms=model.ttl_ms,
        stale_ms=model.stale_ms,
        unloaded=not held.loaded,
    )
