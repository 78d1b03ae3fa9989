"""What a worker does with a request: join, decode, batch, run, encode."""

from __future__ import annotations

import logging
import time

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.batcher import BatchResult
from services.inference.held_models import HeldModel
from services.inference.load import Load
from services.inference.memory_budget import ModelChangedError
from services.inference.model_store import ModelStore
from services.inference.request import encode_response
from services.inference.request_decoder import RequestDecoder
from services.inference.shared_memory import SharedMemory
from services.runtime.errors import RingmeshError
from services.runtime.rpc import parse, unexpected
from services.runtime.single_flight import SingleFlight
from services.runtime.tracing import Attributes, Trace, Tracer

log = logging.getLogger(__name__)


class Worker:
    """Runs requests on the models held. Knows no RPC: results and failures are values."""

    def __init__(self, worker_id: str, store: ModelStore, tracer: Tracer) -> None:
        self.worker_id = worker_id
        self.store = store
        self.memory = SharedMemory()
        self.accepting = True
        self._decoder = RequestDecoder(self.memory)
        self.load = Load(time.monotonic)
        self._tracer = tracer
        self._flights: SingleFlight[inference_pb2.WorkResult] = SingleFlight()

    async def execute(
        self, data: bytes, *, request_hash: bytes, deadline: float | None, traceparent: str | None
    ) -> inference_pb2.WorkResult:
        """The response without an id, or the failure. Equal requests in flight (by hash; b"": never) run once."""
        start = time.time_ns()
        trace = self._tracer.start(traceparent)
        name = ""
        try:
            request = parse(v2.ModelInferRequest, data)
            name = request.model_name
            held = self.store.held.find(name, request.model_version)
            if request_hash:
                key = held.model.digest + request_hash
                result, joined = await self._flights.run(
                    key, lambda: self._run(held, request, deadline, trace), deadline
                )
                if joined:
                    shared, result = result, inference_pb2.WorkResult()
                    result.CopyFrom(shared)
                    result.timing.joined = True
            else:
                result = await self._run(held, request, deadline, trace)
        except RingmeshError as error:
            result = inference_pb2.WorkResult(failure=error.to_failure())
        except Exception as error:
            log.exception("trace %s: model %s failed", trace.trace_id, name)
            result = inference_pb2.WorkResult(failure=unexpected(error).to_failure())
        if trace.sampled:
            attributes: Attributes = {"ringmesh.model": name, "ringmesh.joined": result.timing.joined}
            failure = result.failure.message
            self._tracer.finish(trace, "worker Execute", start, time.time_ns(), attributes, failure)
        return result

    async def _run(
        self,
        held: HeldModel,
        request: v2.ModelInferRequest,
        deadline: float | None,
        trace: Trace,
        *,
        caught_up: bool = False,
    ) -> inference_pb2.WorkResult:
        start = time.time_ns()
        self.load.started()
        try:
            decoded = self._decoder.decode(request, held.model)
            batch = await held.submit(decoded, deadline)
            response = encode_response(held.model, decoded, batch.arrays)
        except ModelChangedError as changed:
            if caught_up:
                raise
            await self.store.catch_up(changed.model, deadline)
            held = self.store.held.find(request.model_name, request.model_version)
            return await self._run(held, request, deadline, trace, caught_up=True)
        except Exception:
            held.statistics.failed(time.time_ns() - start)
            raise
        finally:
            self.load.ended()
        held.statistics.succeeded(batch, decoded.rows, time.time_ns() - start, time.time_ns() - batch.end_ns)
        _record(trace, held, batch)
        timing = inference_pb2.Timing(
            queue_us=(batch.start_ns - batch.queued_ns) // 1000,
            compute_us=(batch.end_ns - batch.start_ns) // 1000,
            batch_requests=batch.batch_requests,
            batch_rows=batch.batch_rows,
        )
        return inference_pb2.WorkResult(response=response, model_digest=held.model.digest, timing=timing)


def _record(trace: Trace, held: HeldModel, batch: BatchResult) -> None:
    if not trace.sampled:
        return
    trace.span("queue", batch.queued_ns, batch.start_ns, {})
    sizes: Attributes = {"ringmesh.batch.requests": batch.batch_requests, "ringmesh.batch.rows": batch.batch_rows}
    trace.span("batch", batch.start_ns, batch.end_ns, sizes)
    run: Attributes = {"ringmesh.provider": held.model.provider, "ringmesh.model.version": str(held.model.version)}
    trace.span("onnxruntime run", batch.run_ns, batch.end_ns, run)
