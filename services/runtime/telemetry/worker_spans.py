"""A worker's spans of a request, built from the timings that its answer carries."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterator

from ringmesh.inference.v1 import inference_pb2

from services.runtime.errors import CODE_NAMES
from services.runtime.telemetry.spans import Attributes, Kind, Process, Span
from services.runtime.w3c import new_span_id

STEP = "ensemble step"
EXECUTE = "ringmesh.inference.v1.InferenceWorkerService/Execute"
_CONTEXT_BYTES = 24


def worker_spans(call: Span, worker: Process, result: inference_pb2.WorkResult) -> Iterator[Span]:
    """Yields the worker's own span under `call` (the router's span of the call), and the spans below it."""
    timing = result.timing
    if not timing.received_unix_ns:
        return
    took = timing.total_us * 1000
    start = timing.received_unix_ns
    if not call.start_ns <= start <= start + took <= call.end_ns:
        # The worker's clock differs from ours, so place its span in the middle of the call.
        start = call.start_ns + max(0, call.end_ns - call.start_ns - took) // 2
    span_id = new_span_id()
    failure = result.failure.message
    attributes: Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": EXECUTE,
        "rpc.response.status_code": CODE_NAMES.get(result.failure.code, "UNKNOWN"),
        "ringmesh.worker.id": worker.instance,
        "ringmesh.joined": timing.joined,
    }
    # It joined the run of one of these requests.
    links = _links(timing) if timing.joined else ()
    yield Span(
        worker, call.trace_id, span_id, call.span_id, EXECUTE, Kind.SERVER, start, start + took, attributes, failure,
        call.trace_state, (), links,
    )  # fmt: skip
    yield from run_spans(call.trace_id, span_id, worker, timing, start)


def run_spans(
    trace_id: str, parent_id: str, worker: Process, timing: inference_pb2.Timing, received_ns: int = 0
) -> Iterator[Span]:
    """Yields queue, batch and run under the span `parent_id`, or the steps of an ensemble, each with its own.

    Yields nothing if the request never reached a batch, or joined another request.
    """
    received_ns = received_ns or timing.received_unix_ns
    if timing.joined or not timing.batch_requests:
        return
    for step in timing.steps:
        start = received_ns + step.begun_at_us * 1000
        attributes: Attributes = {"ringmesh.model.name": step.model, "ringmesh.model.version": step.version}
        step_id = new_span_id()
        yield Span(
            worker, trace_id, step_id, parent_id, STEP, Kind.INTERNAL, start, start + step.timing.total_us * 1000,
            attributes,
        )  # fmt: skip
        yield from run_spans(  # compiled: protobuf parses at most 100 levels
            trace_id, step_id, worker, step.timing, start
        )
    if timing.steps:
        return
    queued = received_ns + timing.queued_at_us * 1000
    start = queued + timing.queue_us * 1000
    end = start + timing.compute_us * 1000
    run = min(end, max(start, received_ns + timing.run_at_us * 1000))
    sizes: Attributes = {"ringmesh.batch.requests": timing.batch_requests, "ringmesh.batch.rows": timing.batch_rows}

    def span(name: str, parent: str, start_ns: int, end_ns: int, attributes: Attributes) -> Span:
        return Span(worker, trace_id, new_span_id(), parent, name, Kind.INTERNAL, start_ns, end_ns, attributes)

    yield span("queue", parent_id, queued, start, {})
    batch = span("batch", parent_id, start, end, sizes)
    batch.links = _links(timing)
    yield batch
    yield span("onnxruntime run", batch.span_id, run, end, {"ringmesh.provider": timing.provider})


def _links(timing: inference_pb2.Timing) -> tuple[tuple[str, str], ...]:
    members = timing.batch_members.hex()
    contexts = [members[at : at + 2 * _CONTEXT_BYTES] for at in range(0, len(members), 2 * _CONTEXT_BYTES)]
    return tuple((context[:32], context[32:]) for context in contexts)
