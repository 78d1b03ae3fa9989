"""`inference.GRPCInferenceService` on the router: the path of a request."""

from __future__ import annotations

import logging
import os
import time

import grpc
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.entry import Entry
from cache.keys import RequestHasher, UncacheableError, cache_key
from cache.mesh import Computed, Found, Mesh
from router.catalog import ModelEntry
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from services.runtime import protocol
from services.runtime.errors import NotFoundError, RingmeshError, UnavailableError
from services.runtime.rpc import Context, Service, abort, parse, unary, unexpected
from services.runtime.tracing import Attributes, Trace, Tracer

log = logging.getLogger(__name__)


class InferenceService:
    """Answers from the mesh what the fleet has computed before, and has the rest computed once."""

    def __init__(self, fleet: Fleet, mesh: Mesh, hasher: RequestHasher, dispatcher: Dispatcher, tracer: Tracer) -> None:
        self._fleet = fleet
        self._mesh = mesh
        self._hasher = hasher
        self._dispatcher = dispatcher
        self._tracer = tracer

    def service(self, is_ready: protocol.ReadyCheck) -> Service:
        """The handlers, to be served. `is_ready` answers ServerReady."""
        return protocol.service(
            is_ready,
            {
                "ModelReady": unary(v2.ModelReadyRequest, self._model_ready),
                "ModelMetadata": unary(v2.ModelMetadataRequest, self._model_metadata),
                "ModelInfer": grpc.unary_unary_rpc_method_handler(self._model_infer),
            },
        )

    async def _model_ready(self, request: v2.ModelReadyRequest, _: Context) -> v2.ModelReadyResponse:
        try:
            model = self._fleet.view.catalog.find(request.name, request.version)
        except (NotFoundError, UnavailableError):
            return v2.ModelReadyResponse(ready=False)
        members = self._fleet.view.members.values()
        return v2.ModelReadyResponse(ready=any(not member.why_not(model) for member in members))

    async def _model_metadata(self, request: v2.ModelMetadataRequest, _: Context) -> v2.ModelMetadataResponse:
        return self._fleet.view.catalog.find(request.name, request.version).metadata

    async def _model_infer(self, data: bytes, context: Context) -> bytes:
        """Bytes in, bytes out: a hit is answered without serializing a message."""
        start = time.time_ns()
        trace = self._tracer.start(protocol.traceparent(context))
        name = "ModelInfer"
        try:
            request = parse(v2.ModelInferRequest, data)
            name = request.model_name
            found = await self._answer(request, data, context, trace)
        except RingmeshError as error:
            await self._fail(context, trace, name, start, error)
        except Exception as error:
            log.exception("trace %s: %s failed", trace.trace_id, name)
            await self._fail(context, trace, name, start, unexpected(error))
        entry = found.entry
        context.set_trailing_metadata(
            (
                ("ringmesh-cache", found.outcome),
                ("ringmesh-worker", found.worker),
                ("ringmesh-trace-id", trace.trace_id),
                ("ringmesh-compute-us", str(entry.compute_us)),
            )
        )
        if trace.sampled:
            attributes: Attributes = {
                "ringmesh.model": name,
                "ringmesh.cache": found.outcome,
                "ringmesh.request.bytes": len(data),
            }
            self._tracer.finish(trace, "router ModelInfer", start, time.time_ns(), attributes)
        return protocol.with_id(entry.value, request.id)

    async def _answer(self, request: v2.ModelInferRequest, data: bytes, context: Context, trace: Trace) -> Found:
        model = self._fleet.view.catalog.find(request.model_name, request.model_version)
        begin = time.time_ns()
        try:
            if model.uncacheable:
                raise UncacheableError(model.uncacheable)
            request_hash = self._hasher.hash(request)
        except UncacheableError as why:
            trace.span("cache.bypass", begin, time.time_ns(), {"ringmesh.reason": str(why)})
            # Any place on the ring will do, so all of them share the load.
            computed = await self._compute(model, data, b"", os.urandom(2), protocol.deadline(context), trace)
            return Found(computed.entry, "bypass", computed.worker)

        key = cache_key(model.digest, request_hash)
        entry = self._mesh.local.get(key)
        trace.span("cache.local", begin, time.time_ns(), {"ringmesh.cache.hit": entry is not None})
        if entry is not None:
            return Found(entry, "hit-local")
        deadline = protocol.deadline(context)
        return await self._mesh.get_or_compute(
            key, lambda: self._compute(model, data, request_hash, request_hash, deadline, trace), deadline, trace
        )

    async def _compute(
        self, model: ModelEntry, data: bytes, request_hash: bytes, place: bytes, deadline: float | None, trace: Trace
    ) -> Computed:
        """`place` says where on the ring; `request_hash` is b"" where the answer is not to be shared or kept."""
        result, member = await self._dispatcher.run(
            model, data, place, trace, request_hash=request_hash, deadline=deadline
        )
        key = cache_key(result.model_digest, request_hash) if request_hash else None
        return Computed(Entry(result.response, _compute_us(result)), key, member.worker_id)

    async def _fail(self, context: Context, trace: Trace, name: str, start: int, error: RingmeshError) -> None:
        attributes: Attributes = {"ringmesh.model": name, "rpc.grpc.status_code": error.code.value[0]}
        self._tracer.finish(trace, "router ModelInfer", start, time.time_ns(), attributes, error.message)
        await abort(context, error, (("ringmesh-trace-id", trace.trace_id),))


def _compute_us(result: inference_pb2.WorkResult) -> int:
    """This request's part of the run that served it."""
    timing = result.timing
    return int(timing.compute_us // max(1, timing.batch_requests))
