"""Sends a request to its owner on the ring, and on to the next where that one cannot be reached or has enough."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from ringmesh.inference.v1 import inference_pb2

from router.admission.caller import ANYBODY, Caller, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimit, ConcurrencyLimits
from router.attempt_span import at_bound, attempt_attributes, consideration
from router.catalog import ModelEntry
from router.dispatch_metrics import ATTEMPTS, RETRIES_DENIED, SHEDS
from router.fleet import Fleet
from router.member import Member
from router.picker import Candidate, candidates
from router.retry_budget import RetryBudget
from router.ring import RANKS
from router.worker_link import Work, WorkerLostError, WorkerUnreachableError
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
    from_failure,
)
from services.runtime.metrics import Counter, Sample
from services.runtime.spans import Event, Kind
from services.runtime.tracing import Trace
from services.runtime.w3c import new_span_id
from services.runtime.worker_spans import EXECUTE

# Failures of this worker, and perhaps not of another.
_UNAVAILABLE = UnavailableError.code.value[0]
_FAILED_PRECONDITION = FailedPreconditionError.code.value[0]
_RESOURCE_EXHAUSTED = ResourceExhaustedError.code.value[0]
# Workers that an error says something of; a fleet may be large.
_TOLD = 8
_ELSEWHERE = frozenset((_UNAVAILABLE, _FAILED_PRECONDITION, _RESOURCE_EXHAUSTED))
# A request that kills who runs it would else go through the whole fleet.
MOST_ENDED = 2


class Dispatcher:
    """Runs requests on the workers of `fleet`, within `limits` on what is under way to each, and `retries`."""

    def __init__(self, fleet: Fleet, limits: ConcurrencyLimits, retries: RetryBudget) -> None:
        self._fleet = fleet
        self._limits = limits
        self._retries = retries
        self._attempts = Counter(ATTEMPTS)
        self._sheds = 0

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield from self._attempts.samples()
        yield Sample(RETRIES_DENIED, (), self._retries.denied)
        yield Sample(SHEDS, ("overload",), self._sheds)

    async def run(
        self,
        model: ModelEntry,
        request: bytes,
        place: bytes,
        trace: Trace,
        *,
        request_hash: bytes = b"",
        deadline: float | None = None,
        caller: Caller = ANYBODY,
    ) -> tuple[inference_pb2.WorkResult, Member]:
        """The first answer that a worker gives, in the picker's order for `place`, and who gave it.

        Inference is idempotent, so an attempt whose worker is lost is made again elsewhere, but not where the request
        may be what ends them. Raises the worker's own error, RefusedError where all have enough to do, or
        UnavailableError where nobody could be reached.
        """
        sticky = bool(place) and not request_hash
        skipped = []
        failure: inference_pb2.Failure | None = None
        full = False
        considered: list[Event] = []
        attempts = ended = 0
        put_off: list[Candidate] = []
        for candidate in candidates(self._fleet.view, model, place, sticky=sticky, put_off=put_off):
            if attempts == RANKS:
                break
            member = candidate.member
            if candidate.reason:
                considered.append(consideration(candidate, candidate.reason))
                skipped.append(f"{member.worker_id}: {candidate.reason}")
                continue
            limit = self._limits.of(member.address, model.digest)
            # A sequence goes where its state is, one step at a time; what was admitted and lost is not refused.
            if not sticky and not attempts and not limit.admits(caller.priority):
                full = True
                why = f"has {limit.in_flight} requests under way, as many as it can answer"
                considered.append(consideration(candidate, why))
                skipped.append(f"{member.worker_id}: {why}")
                continue
            if not attempts:
                self._retries.request()
            elif not self._retries.take():
                skipped.append("not tried further: too many requests needed retries in the last seconds")
                break
            attempts += 1
            try:
                considered += [at_bound(candidate) for candidate in put_off if candidate.is_full]
                considered.append(consideration(candidate, ""))
                events, considered = tuple(considered), []
                kind = "retry" if attempts > 1 else "first"
                result = await self._attempt(
                    candidate, limit, model, request, request_hash, deadline, trace, events, kind
                )
            except WorkerUnreachableError as lost:
                self._fleet.failed(member, lost)
                skipped.append(f"{member.worker_id}: {lost}")
                ended += isinstance(lost, WorkerLostError)
                if ended == MOST_ENDED:
                    skipped.insert(0, f"not tried further: {ended} workers ended while they had it")
                    break
                continue
            if not result.HasField("failure"):
                return result, member
            if result.failure.code not in _ELSEWHERE:
                raise from_failure(result.failure)
            skipped.append(f"{member.worker_id}: {result.failure.message}")
            # Also for a sequence that began elsewhere, before its place on the ring went to this one.
            if failure is None and result.failure.code != _UNAVAILABLE:
                failure = result.failure
        if failure is not None:
            raise from_failure(failure)
        why = "; ".join(skipped[:_TOLD])
        if full:
            self._sheds += 1
            # Spread, so that those who are told so at once do not come back at once.
            seconds = self._limits.target * random.uniform(0.5, 1.5)
            raise RefusedError(
                f"overloaded: no worker can take more of model {model.name!r} now, retry later; {why}",
                caller,
                retry_after=seconds,
            )
        raise UnavailableError(f"no worker could answer for model {model.name!r}, retry later; {why}")

    async def _attempt(
        self,
        candidate: Candidate,
        limit: ConcurrencyLimit,
        model: ModelEntry,
        request: bytes,
        request_hash: bytes,
        deadline: float | None,
        trace: Trace,
        events: tuple[Event, ...],
        kind: str,
    ) -> inference_pb2.WorkResult:
        """The worker's result, success or failure. Raises WorkerUnreachableError, DeadlineExceededError."""
        member = candidate.member
        span_id = new_span_id()
        work = Work(request, request_hash, deadline, trace.traceparent(span_id))
        start = time.time_ns()
        began = time.monotonic()
        error = ""
        result = None
        begun = limit.begin()
        try:
            result = await member.link.execute(model.digest, work)
            self._fleet.answered(member, model.digest, time.monotonic() - began)
            error = result.failure.message
            if not result.timing.joined:
                limit.completed(begun, time.monotonic() - began, result.timing.compute_us / 1e6)
            return result
        except DeadlineExceededError as late:
            limit.completed(begun, time.monotonic() - began, 0.0)
            error = late.message
            raise
        except WorkerUnreachableError as lost:
            error = str(lost)
            raise
        finally:
            limit.end()
            attributes = attempt_attributes(member, candidate.rank, result)
            self._attempts.add(member.worker_id, kind, str(attributes["rpc.response.status_code"]))
            trace.span(
                EXECUTE,
                start,
                time.time_ns(),
                attributes,
                span_id,
                kind=Kind.CLIENT,
                error=error,
                events=events,
                worker=member.worker_id,
                result=result,
            )
