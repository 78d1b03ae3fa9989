"""The worker's gRPC services: the v2 protocol for callers, envelopes for routers."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import random
import time
from collections.abc import Mapping

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.envelope import Work
from services.inference.execution.model import OnnxModel
from services.inference.models.decisions import request_of
from services.inference.models.ensemble import Ensemble
from services.inference.models.held_models import HeldModel
from services.inference.worker import Worker
from services.runtime import driver, w3c
from services.runtime.driver import ON_LOOP
from services.runtime.errors import NotFoundError, RingmeshError, UnavailableError, from_failure
from services.runtime.large_result import LARGE_RESPONSE_BYTES, SplitResult, pieces_of
from services.runtime.oip import protocol
from services.runtime.oip.absent_model import Failures
from services.runtime.oip.infer_request import model_name, request_id
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.oip.stream_infer import stream_handler
from services.runtime.request_limits import check_list
from services.runtime.rpc.access import Access
from services.runtime.rpc.calls import Calls
from services.runtime.rpc.rpc import Answer, Context, Failure, Handler, Metadata, Service, failure, parse, unary
from services.runtime.rpc.rpc import metadata as metadata_of
from services.runtime.telemetry.load_report import LoadReport
from services.runtime.telemetry.tracing import Tracer
from services.runtime.telemetry.worker_spans import EXECUTE

# Limits for the failed loads in a description; the index lists all of them.
_MOST_FAILURES = 1000
_LONGEST_REASON = 300
# In every request of a sequence.
_SEQUENCE = b"sequence_id"
_DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["InferenceWorkerService"]


class DirectService:
    """`inference.GRPCInferenceService`, called at this worker directly. It does not cache."""

    def __init__(self, worker: Worker, tracer: Tracer, report: LoadReport, access: Access) -> None:
        self._worker = worker
        self._access = access
        self._tracer = tracer
        self._report = report

    def service(self, is_ready: protocol.ReadyCheck, control: Mapping[str, Handler], calls: Calls) -> Service:
        """The handlers, and `control` of the same service. `calls` counts the calls. `is_ready` answers ServerReady."""
        return protocol.service(
            is_ready,
            {
                "ModelReady": unary(v2.ModelReadyRequest, self._model_ready),
                "ModelMetadata": unary(v2.ModelMetadataRequest, self._model_metadata),
                "ModelStreamInfer": stream_handler(self._stream_infer),
                **control,
            },
            {"ModelInfer": calls.counted_path(protocol.full_name("ModelInfer"), self._model_infer)},
        )

    async def _model_ready(self, request: v2.ModelReadyRequest, _: Context) -> v2.ModelReadyResponse:
        try:
            held = self._worker.store.held.find(request.name, request.version)
        except (NotFoundError, UnavailableError):
            return v2.ModelReadyResponse(ready=False)
        return v2.ModelReadyResponse(ready=bool(held.model.runnable))

    async def _model_metadata(self, request: v2.ModelMetadataRequest, _: Context) -> v2.ModelMetadataResponse:
        held = self._worker.store.held
        metadata = _metadata(held.find(request.name, request.version).model)
        metadata.versions[:] = held.versions(request.name)
        return metadata

    async def _execute(self, data: bytes, metadata: Metadata, deadline: float | None, method: str) -> SplitResult:
        caller = protocol.caller_metadata(metadata)
        if self._access.is_closed:
            protocol.identify(caller, self._access)
            if caller.error is not None:
                raise caller.error
            if caller.identity is not None:
                caller.identity.check_model(model_name(data))
            if _SEQUENCE in data:
                data = protocol.of_tenant(data, caller.tenant)
        trace = self._tracer.start(caller.traceparent)
        trace.span_id = w3c.new_span_id()
        start = time.time_ns()
        work = Work(data, b"", deadline, bytes.fromhex(trace.trace_id + trace.span_id))
        (result,) = await self._worker.execute([work])
        if self._tracer.ratios:
            self._tracer.sample(trace, model_name(data))
        if trace.sampled or result.HasField("failure"):
            name, failure = protocol.full_name(method), result.failure
            attributes = protocol.span_attributes(method, failure.code)
            self._tracer.finish(trace, name, start, time.time_ns(), attributes, failure.message, result.timing)
        return result

    async def _model_infer(self, data: bytes, metadata: Metadata, deadline: float | None) -> Answer | Failure:
        await ON_LOOP
        result = await self._execute(data, metadata, deadline, "ModelInfer")
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
        metadata, deadline = metadata_of(context), protocol.deadline(context)
        result = await driver.run(self._execute(data, metadata, deadline, "ModelStreamInfer"))
        if result.HasField("failure"):
            raise from_failure(result.failure)
        return protocol.answered(result.response, request_id(data), ())


class EnvelopeService:
    """`ringmesh.inference.v1.InferenceWorkerService`: runs envelopes, and describes this worker and its models."""

    def __init__(self, worker: Worker, region: str = "", zone: str = "", weight: float = 1.0) -> None:
        """`weight`: its share of the keys relative to other workers."""
        self._worker = worker
        self._region, self._zone, self._weight = region, zone, weight
        # The Unix socket for routers of this host, "" while there is none, and the gRPC port.
        self.socket = ""
        self.port = 0
        self._held = worker.store.held
        # Versions differ between two runs of a worker.
        self._version = random.getrandbits(62) + 1

    def service(self, calls: Calls) -> Service:
        execute = calls.counted_path(EXECUTE, self.execute)
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

    async def execute(self, data: bytes, _: Metadata, __: float | None) -> Answer | Failure:
        """Answers an ExecuteRequest. Must be run by a driver."""
        try:
            works = self._works(data)
        except RingmeshError as error:
            return failure(error)
        return self._answer(await self._worker.execute(works))

    def _works(self, data: bytes) -> list[Work]:
        if not self._worker.accepting:
            raise UnavailableError("the worker is draining")
        check_list(data)
        request = parse(inference_pb2.ExecuteRequest, data)
        now = time.monotonic()
        return [
            Work(
                item.request,
                item.request_hash,
                now + item.timeout_us / 1e6 if item.timeout_us else None,
                w3c.packed(item.traceparent),
            )
            for item in request.items
        ]

    def _answer(self, results: list[SplitResult]) -> Answer:
        pieces = pieces_of(results, self._load())
        if max([len(result.response) for result in results], default=0) > LARGE_RESPONSE_BYTES:
            return Answer(b"", (), None, pieces)
        return Answer(b"".join(pieces), ())

    async def _withdraw(self, request: inference_pb2.WithdrawRequest, _: Context) -> inference_pb2.WithdrawResponse:
        return inference_pb2.WithdrawResponse(
            withdrawn=self._worker.withdraw(w3c.packed(traceparent) for traceparent in request.traceparents)
        )

    async def _describe(self, request: inference_pb2.DescribeRequest, _: Context) -> inference_pb2.DescribeResponse:
        load = self._load()
        known = request.known_version == load.version
        # A copy, because a thread may be adding a decision.
        decided = () if known else [*self._worker.store.decisions.decided_ns]
        return inference_pb2.DescribeResponse(
            worker_id=self._worker.worker_id,
            accepting=self._worker.accepting,
            models=() if known else [describe(held) for held in self._held],
            load=load,
            version=load.version,
            region=self._region,
            zone=self._zone,
            weight=self._weight,
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
        """Announces this worker to routers that do not know it yet. They reach it at `address`."""
        return inference_pb2.Announcement(
            address=address,
            worker_id=self._worker.worker_id,
            region=self._region,
            zone=self._zone,
            weight=self._weight,
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
    described = [
        inference_pb2.FailedVersion(model=name, version=version, reason=reason[:_LONGEST_REASON])
        for name, versions in failures.items()
        for version, reason in versions.items()
    ]
    return described[:_MOST_FAILURES]


def _metadata(model: OnnxModel | Ensemble) -> v2.ModelMetadataResponse:
    """The metadata without versions."""
    tensor = v2.ModelMetadataResponse.TensorMetadata
    inputs, outputs = (
        [tensor(name=spec.name, datatype=spec.datatype.name, shape=spec.shape) for spec in specs.values()]
        for specs in (model.inputs, model.outputs)
    )
    return v2.ModelMetadataResponse(name=model.name, platform=model.platform, inputs=inputs, outputs=outputs)


def describe(held: HeldModel) -> inference_pb2.ModelVersion:
    model = held.model
    ensemble = None
    if isinstance(model, Ensemble):
        ensemble = inference_pb2.Ensemble(
            own_digest=model.own_digest, config=model.config(), not_runnable=model.runnable.reason
        )
    version = inference_pb2.ModelVersion(
        ensemble=ensemble,
        name=model.name,
        version=str(model.version),
        digest=model.digest,
        cacheable=bool(model.cacheable),
        cacheable_reason=model.cacheable.reason,
        max_batch_rows=model.max_batch_rows,
        max_request_rows=model.max_request_rows,
        batch_remark=model.batch_remark,
        limits_queue=model.limits_queue,
        optional_inputs=[name for name in model.inputs if name not in model.required],
        provider=model.provider,
        metadata=_metadata(model),
        row_cache=bool(model.row_cache),
        unloaded=not held.loaded,
    )
    version.MergeFrom(model.rules)
    return version
