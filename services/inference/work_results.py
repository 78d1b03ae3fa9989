"""What a router is told of a request: a WorkResult, with the times of the run behind it."""

from __future__ import annotations  # compiled by mypyc

import logging
import time
from collections.abc import Sequence

from ringmesh.inference.v1 import inference_pb2

from services.inference.codec.request import Decoded, encode_response
from services.inference.models.held_models import HeldModel
from services.inference.scheduling.batcher import BatchResult
from services.runtime import faults, wire
from services.runtime.errors import ResourceExhaustedError, kind_of
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import LARGE_RESPONSE_BYTES, LargeResult, Result

log = logging.getLogger(__name__)

MAX_RESPONSE_BYTES = 1 << 30


# Strings are encoded one by one.
_MANY_STRINGS = 1000


def is_large(batch: BatchResult) -> bool:
    """Whether the response is to be encoded on a thread."""
    size = 0
    for array in batch.arrays:
        if array.dtype.hasobject and array.size > _MANY_STRINGS:
            return True
        size += array.nbytes
    return size > LARGE_BYTES


def encode(held: HeldModel, decoded: Decoded, batch: BatchResult) -> bytes:
    """The serialized response. Raises ResourceExhaustedError where it would be too large."""
    if (size := sum([array.nbytes for array in batch.arrays])) > MAX_RESPONSE_BYTES:
        raise ResourceExhaustedError(
            f"model {held.model.name!r} answers this request with {size} bytes; an answer has at most "
            f"{MAX_RESPONSE_BYTES}",
            kind="too_large",
        )
    return encode_response(held.model, decoded, batch.arrays)


def answered(held: HeldModel, decoded: Decoded, batch: BatchResult, response: bytes, start: int) -> Result:
    """That `response` is there; it is counted. `start` in time.time_ns, as of what follows."""
    now = time.time_ns()
    held.statistics.succeeded(batch, decoded.rows, now - start, now - batch.end_ns)
    timing = _timing(held.model.provider, batch, start, now)
    for step in batch.steps:
        timing.steps.add(
            model=step.model.name,
            version=str(step.model.version),
            begun_at_us=(step.begun_ns - start) // 1000,
            timing=_timing(step.model.provider, step.batch, step.begun_ns, step.ended_ns),
        )
    if len(response) > LARGE_RESPONSE_BYTES:
        return LargeResult(inference_pb2.WorkResult(model_digest=held.model.digest, timing=timing), response)
    return inference_pb2.WorkResult(response=response, model_digest=held.model.digest, timing=timing)


def _timing(provider: str, batch: BatchResult, start: int, end: int) -> inference_pb2.Timing:
    return inference_pb2.Timing(
        queue_us=(batch.start_ns - batch.queued_ns) // 1000,
        compute_us=(batch.end_ns - batch.start_ns) // 1000,
        batch_requests=batch.batch_requests,
        batch_rows=batch.batch_rows,
        received_unix_ns=start,
        total_us=(end - start) // 1000,
        queued_at_us=(batch.queued_ns - start) // 1000,
        run_at_us=(batch.run_ns - start) // 1000,
        provider=provider,
        batch_members=batch.members,
    )


def answered_together(
    held: HeldModel, requests: Sequence[Decoded], batches: Sequence[BatchResult | Exception], start: int
) -> list[bytes]:
    """Serialized, of requests that ran at once: what is the same for all of a run is put together once."""
    digest = wire.field(3, held.model.digest)
    results: list[bytes] = []
    shared = b""
    runs: list[_Run] = []
    for decoded, batch in zip(requests, batches, strict=True):
        try:
            if isinstance(batch, Exception):
                raise batch
            if batch.first:
                timing = _timing(held.model.provider, batch, start, time.time_ns())
                shared = digest + wire.field(4, timing.SerializeToString())
                runs.append(_Run(batch))
            results.append(wire.field(1, encode(held, decoded, batch)) + shared)
            runs[-1].requests += 1
            runs[-1].rows += decoded.rows
        except Exception as error:
            held.statistics.failed(time.time_ns() - start, kind_of(error))
            results.append(failed(error, start).SerializeToString())
    now = time.time_ns()
    for run in runs:
        held.statistics.succeeded(run.batch, run.rows, now - start, now - run.batch.end_ns, run.requests)
    return results


class _Run:
    """Those that one run answered."""

    __slots__ = ("batch", "requests", "rows")

    def __init__(self, batch: BatchResult) -> None:
        self.batch = batch
        self.requests = self.rows = 0


def failed(error: Exception, start: int) -> inference_pb2.WorkResult:
    """That there is none; what is no RingmeshError is logged."""
    told = faults.told(log, "a request failed", error)
    timing = inference_pb2.Timing(received_unix_ns=start, total_us=(time.time_ns() - start) // 1000)
    return inference_pb2.WorkResult(failure=told.to_failure(), timing=timing)
