"""Sends a request to its owner on the ring, and on to the next where that one cannot be reached."""

from __future__ import annotations

import time

from ringmesh.inference.v1 import inference_pb2

from router.catalog import ModelEntry
from router.fleet import Fleet, Member
from router.picker import candidates
from router.ring import RANKS
from router.worker_link import Work, WorkerUnreachableError
from services.runtime.errors import FailedPreconditionError, UnavailableError, from_failure
from services.runtime.tracing import Trace, new_span_id

# Failures of this worker, and perhaps not of another.
_UNAVAILABLE = UnavailableError.code.value[0]
_FAILED_PRECONDITION = FailedPreconditionError.code.value[0]


class Dispatcher:
    """Runs requests on the workers of `fleet`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def run(
        self,
        model: ModelEntry,
        request: bytes,
        place: bytes,
        trace: Trace,
        *,
        request_hash: bytes = b"",
        deadline: float | None = None,
    ) -> tuple[inference_pb2.WorkResult, Member]:
        """The first answer that a worker gives, in the picker's order for `place`, and who gave it.

        Inference is idempotent, so an attempt whose worker is lost is made again elsewhere. Raises the worker's own
        error, or UnavailableError where nobody could be reached.
        """
        view = self._fleet.view
        skipped = []
        lacking: inference_pb2.Failure | None = None
        attempts = 0
        for candidate in candidates(view, model, place, sticky=bool(place) and not request_hash):
            if attempts == RANKS:
                break
            member = candidate.member
            if candidate.reason:
                skipped.append(f"{member.worker_id}: {candidate.reason}")
                continue
            attempts += 1
            span_id = new_span_id() if trace.sampled else ""
            work = Work(request, request_hash, deadline, trace.traceparent(span_id) if trace.sampled else "")
            start = time.time_ns()
            error = ""
            try:
                result = await member.link.execute(model.digest, work)
                if result.failure.code == _FAILED_PRECONDITION:
                    # A sequence that began elsewhere, before its place on the ring went to this one.
                    lacking = lacking or result.failure
                elif result.failure.code != _UNAVAILABLE:
                    if result.HasField("failure"):
                        raise from_failure(result.failure)
                    return result, member
                error = result.failure.message
            except WorkerUnreachableError as lost:
                self._fleet.failed(member, lost)
                error = str(lost)
            finally:
                trace.span(
                    "forward",
                    start,
                    time.time_ns(),
                    {"ringmesh.worker": member.worker_id, "ringmesh.rank": candidate.rank, "ringmesh.error": error},
                    span_id,
                )
            skipped.append(f"{member.worker_id}: {error}")
        if lacking is not None:
            raise from_failure(lacking)
        raise UnavailableError(f"no worker could answer for model {model.name!r}, retry later; {'; '.join(skipped)}")
