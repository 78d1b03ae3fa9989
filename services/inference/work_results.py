"""Builds the result of a request for a router: a WorkResult with the timing of the run."""

from __future__ import annotations  # compiled by mypyc

import logging
import time
from collections.abc import Sequence

from ringmesh.inference.v1 import inference_pb2

from services.inference.codec.request import Decoded, encode_response
from services.inference.models.held_models import HeldModel
from services.inference.scheduling.batcher import BatchResult
from services.runtime import faults, wire
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError, kind_of
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import SplitResult

log = logging.getLogger(__name__)

MAX_RESPONSE_BYTES = 1 << 30


# The tag of Timing.share_us.
_SHARE = wire.varint(13 << 3)
# A response with more strings than this is large: strings are encoded one by one.
_MANY_STRINGS = 1000


def is_large(batch: BatchResult) -> bool:
    size = 0
    for array in batch.arrays:
        if array.dtype.hasobject and array.size > _MANY_STRINGS:
            return True
        size += array.nbytes
    return size > LARGE_BYTES


def build_results(
    held: HeldModel, requests: Sequence[Decoded], batches: Sequence[BatchResult | Exception], start: int
) -> list[SplitResult]:
    """Builds and counts the results of requests of one model that have run. May be called on any thread.

    `start`: in time.monotonic_ns. Results of one run share everything but their responses and shares.
    """
    digest = wire.field(3, held.model.digest)
    results: list[SplitResult] = []
    runs: list[_Run] = []
    run: _Run | None = None
    for decoded, batch in zip(requests, batches, strict=True):
        try:
            if isinstance(batch, Exception):
                raise batch
            if batch.first:
                run = None
            response = _encode(held, decoded, batch)
            if run is None:
                timing = _timing(held.model.provider, batch, start, time.monotonic_ns())
                run = _Run(batch, digest + wire.field(4, timing.SerializeToString()))
                runs.append(run)
            run.requests += 1
            run.rows += decoded.rows
            serialized = run.serialized
            if batch.share_us != run.batch.share_us:
                serialized += wire.field(4, _SHARE + wire.varint(batch.share_us))  # is merged with the run's timing
            results.append(SplitResult(None, response, serialized))
        except Exception as error:
            held.statistics.failed(time.monotonic_ns() - start, kind_of(error))
            if isinstance(error, InvalidArgumentError):
                error.model_digest = held.model.digest
            results.append(failed(error, start, held.model.name, decoded.trace_context))
    now = time.monotonic_ns()
    for run in runs:
        batch = run.batch
        held.statistics.succeeded(batch, run.rows, now - start, now - batch.end_ns, run.requests)
    return results


class _Run:
    """The requests that one run answered."""

    def __init__(self, batch: BatchResult, serialized: bytes) -> None:
        self.batch = batch
        self.serialized = serialized
        self.requests = self.rows = 0


def _encode(held: HeldModel, decoded: Decoded, batch: BatchResult) -> bytes:
    """The serialized response. Raises ResourceExhaustedError if it would be too large."""
    if (size := sum([array.nbytes for array in batch.arrays])) > MAX_RESPONSE_BYTES:
        raise ResourceExhaustedError(
            f"model {held.model.name!r} answers this request with {size} bytes; an answer has at most "
            f"{MAX_RESPONSE_BYTES}",
            kind="too_large",
        )
    return encode_response(held.model, decoded, batch.arrays)


def _timing(provider: str, batch: BatchResult, start: int, end: int) -> inference_pb2.Timing:
    timing = inference_pb2.Timing(
        queue_us=(batch.start_ns - batch.queued_ns) // 1000,
        compute_us=(batch.end_ns - batch.start_ns) // 1000,
        share_us=batch.share_us,
        batch_requests=batch.batch_requests,
        batch_rows=batch.batch_rows,
        received_unix_ns=_unix_ns(start),
        total_us=(end - start) // 1000,
        queued_at_us=(batch.queued_ns - start) // 1000,
        run_at_us=(batch.run_ns - start) // 1000,
        provider=provider,
        batch_members=batch.members,
    )
    for step in batch.steps:
        timing.steps.add(
            model=step.model.name,
            version=str(step.model.version),
            begun_at_us=(step.begun_ns - start) // 1000,
            timing=_timing(  # compiled: once, for a step is no ensemble
                step.model.provider, step.batch, step.begun_ns, step.ended_ns
            ),
        )
    return timing


def _unix_ns(at: int) -> int:
    """The time of day of a time of time.monotonic_ns."""
    return time.time_ns() - (time.monotonic_ns() - at)


def failed(error: Exception, start: int, model: str = "", trace_context: bytes = b"") -> SplitResult:
    """The result of a request that failed. Logs errors other than RingmeshError."""
    what = f"a request of model {model} failed" if model else "a request failed"
    shown = faults.reported(log, what, error, trace_context[:16].hex())
    timing = inference_pb2.Timing(received_unix_ns=_unix_ns(start), total_us=(time.monotonic_ns() - start) // 1000)
    failure = inference_pb2.WorkResult(failure=shown.to_failure(), model_digest=shown.model_digest, timing=timing)
    return SplitResult(failure, b"")


def joined(result: SplitResult, start: int) -> SplitResult:
    """The result of a request received at `start` that joined an equal request and shares its `result`."""
    message = inference_pb2.WorkResult()
    message.CopyFrom(result.message)
    message.timing.joined = True
    message.timing.received_unix_ns = _unix_ns(start)
    message.timing.total_us = (time.monotonic_ns() - start) // 1000
    return SplitResult(message, result.response)
