"""The attempts of one request: first at its owner, then at the next worker if that one is lost or at its limit."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from ringmesh.inference.v1 import inference_pb2

from router.accounting.dispatch_metrics import DispatchMetrics
from router.admission.caller import ANYBODY, Caller
from router.admission.concurrency_limit import ConcurrencyLimit, ConcurrencyLimits
from router.balancing.catalog import ModelEntry
from router.balancing.member import Member
from router.balancing.picker import Candidate, candidates
from router.balancing.ring import RANKS
from router.balancing.view import FleetView
from router.dispatch.attempt_span import Attempted, Consideration, at_bound, code_name
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.transport.worker_client import (
    EnvelopeItem,
    ItemOutcome,
    LinkClosedError,
    NotSentError,
    WorkerLostError,
    WorkerUnreachableError,
)
from services.runtime.driver import Promise
from services.runtime.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    RingmeshError,
    UnavailableError,
    from_failure,
)
from services.runtime.faults import internal
from services.runtime.large_result import Result, SplitResult, message_of
from services.runtime.telemetry.spans import Kind
from services.runtime.telemetry.tracing import Trace
from services.runtime.telemetry.worker_spans import EXECUTE
from services.runtime.w3c import new_span_id

log = logging.getLogger(__name__)

_UNAVAILABLE = UnavailableError.code.value[0]
# Failure codes after which another worker may succeed.
_ELSEWHERE = frozenset((_UNAVAILABLE, FailedPreconditionError.code.value[0], ResourceExhaustedError.code.value[0]))
# Maximum number of workers named in an error; a fleet may be large.
MAX_NAMED = 8
# Without this limit, a request that crashes its worker would crash the whole fleet.
MOST_ENDED = 2
HEDGE = "hedge"
# A parameter of tensors.
_REGION = b"shared_memory_region"


class FatalRequestError(UnavailableError):
    """MOST_ENDED workers ended while they had the request: it must not be sent again."""

    kind = "worker_lost"


class DispatchRequest:
    """A serialized request to run, for `model`, at `ring_hash` (b"": any worker).

    `request_hash`: key by which equal requests join on the worker (b"": none do). `deadline` in time.monotonic.
    """

    def __init__(
        self,
        model: ModelEntry,
        data: bytes,
        ring_hash: bytes,
        trace: Trace,
        *,
        request_hash: bytes = b"",
        deadline: float | None = None,
        caller: Caller = ANYBODY,
    ) -> None:
        self.model = model
        self.data = data
        self.ring_hash = ring_hash
        self.trace = trace
        self.request_hash = request_hash
        self.deadline = deadline
        self.caller = caller

    @property
    def sticky(self) -> bool:
        """Whether the request must go to its owner: it is part of a sequence, whose state is there."""
        return bool(self.ring_hash) and not self.request_hash

    @property
    def may_run_twice(self) -> bool:
        """Whether two workers may run it at once. Both write outputs in shared memory, and the slower one perhaps after
        the caller has used the region for something else. Requests with a hash name no shared memory."""
        return bool(self.request_hash) or _REGION not in self.data


class Workers(Protocol):
    """The fleet as needed for dispatch; Fleet is the real one."""

    @property
    def view(self) -> FleetView: ...
    def failed(self, member: Member, error: WorkerUnreachableError) -> None: ...
    def answered(self, member: Member, model_digest: bytes, seconds: float) -> None: ...


class DispatchParts(NamedTuple):
    """The parts that all dispatches share."""

    fleet: Workers
    limits: ConcurrencyLimits
    retries: RetryBudget
    tails: TailLatency
    metrics: DispatchMetrics
    # Makes the error of a refused request: its model, its caller, and why each worker was skipped.
    shed: Callable[[ModelEntry, Caller, list[str]], RingmeshError]


DispatchResult: TypeAlias = tuple[Result, Member]


class Attempts:
    """Sends a request to workers in the picker's order until one answers.

    Inference is idempotent, so if a worker is lost the request is retried at another, unless it may be the cause of the
    losses. If the model is hedged, a request that is slower than the recent p95 is also sent to a second worker, and
    the first answer wins; not one that names shared memory. The other attempt is removed from its queue, here or at the
    worker, unless it already runs. A hedge counts as a retry. Requests that a closed link gives back cost no retry,
    because one closure affects all requests on the link.
    """

    def __init__(self, parts: DispatchParts, request: DispatchRequest) -> None:
        self.parts = parts
        self.request = request
        # Attempts, without hedges and those never sent; workers that ended while they had the request.
        self._attempts = self._ended = 0
        self._admitted = self._is_free = False
        # Workers at their limit. They are tried last if the request is admitted at another worker and lost there.
        self._full: list[Candidate] = []
        self._failure: inference_pb2.Failure | None = None
        self._skipped: list[str] = []
        self._considered: list[Consideration] = []
        self._put_off: list[Candidate] = []
        self._under_way: list[_Attempt] = []
        self._timer: asyncio.TimerHandle | None = None
        # Attempts that ended; None: the hedge timer fired.
        self._events: list[_Attempt | None] = []
        self._next_event: Promise[_Attempt | None] | None = None
        self._order = candidates(
            parts.fleet.view, request.model, request.ring_hash, sticky=request.sticky, put_off=self._put_off
        )

    async def run(self) -> DispatchResult:
        """The first answer of a worker, and that worker. Cancelled: the attempts under way are withdrawn.

        Raises the worker's own error, RefusedError if all workers are at their limit, or UnavailableError if none could
        be reached.
        """
        try:
            self._attempt_next()
            while True:
                if self._events:
                    attempt = self._events.pop(0)
                else:
                    self._next_event = Promise()
                    attempt = await self._next_event
                if attempt is None:
                    self._hedge()
                    continue
                self._under_way.remove(attempt)
                if (answered := self._judge(attempt, attempt.end())) is not None:
                    return answered
                if not self._under_way:
                    self._attempt_next()
        finally:
            self._stop_timer()
            while self._under_way:
                self._under_way.pop().cancel()

    def on_event(self, attempt: _Attempt | None) -> None:
        """Called when an attempt has ended, or with None when the hedge timer fires."""
        waits, self._next_event = self._next_event, None
        if waits is not None:
            waits.settle(attempt)
        else:
            self._events.append(attempt)

    def _judge(self, attempt: _Attempt, outcome: ItemOutcome) -> DispatchResult | None:
        """The answer, or None if the request needs another attempt or has one under way. Raises a final error."""
        member = attempt.candidate.member
        # Also counts if another attempt is under way, so that at most MOST_ENDED workers are lost in total.
        self._ended += isinstance(outcome, WorkerLostError)
        if self._ended == MOST_ENDED:
            self._skipped.append(f"{member.worker_id}: {outcome}")
            reason = f"not tried further: {self._ended} workers ended while they had it; {join_reasons(self._skipped)}"
            raise FatalRequestError(self._unanswered(reason))
        if isinstance(outcome, WorkerUnreachableError):
            if not self._under_way:
                self._skipped.append(f"{member.worker_id}: {outcome}")
                self._attempts -= isinstance(outcome, NotSentError) and attempt.kind != HEDGE
                self._is_free = isinstance(outcome, LinkClosedError)
            return None
        if isinstance(outcome, RingmeshError):
            raise outcome
        if not (isinstance(outcome, inference_pb2.WorkResult) and outcome.HasField("failure")):
            return outcome, member
        failure = outcome.failure
        if failure.code not in _ELSEWHERE:
            error = from_failure(failure)
            error.model_digest = outcome.model_digest
            raise error
        if not self._under_way:
            self._skipped.append(f"{member.worker_id}: {failure.message}")
            # Also applies to a sequence that began at another worker, before its ring hash moved to this one.
            if self._failure is None and failure.code != _UNAVAILABLE:
                self._failure = failure
        return None

    def _attempt_next(self) -> None:
        """Makes an attempt at the next suitable worker. Raises the error of the request if there is none."""
        self._stop_timer()
        request, parts = self.request, self.parts
        is_free, self._is_free = self._is_free, False
        while self._attempts < RANKS and (candidate := self._next()) is not None:
            member = candidate.member
            if candidate.reason:
                self._skip(candidate, candidate.reason)
                continue
            limit = parts.limits.of(member.address, request.model.digest)
            # A request that was admitted and then lost is not refused, nor is a step of a sequence.
            if not self._admitted:
                if not request.sticky and not limit.admits(request.caller.priority):
                    self._full.append(candidate)
                    self._skip(candidate, no_room(limit))
                    continue
                self._admitted = True
                parts.retries.request()
            elif not is_free and not parts.retries.take():
                self._skipped.append("not tried further: too many requests needed retries in the last seconds")
                break
            self._attempts += 1
            considered = (
                *self._considered,
                *[at_bound(other) for other in self._put_off if other.is_full],
                Consideration(candidate, ""),
            )
            self._considered = []
            if (
                request.model.hedged
                and not request.sticky
                and not self._ended
                and (patience := parts.tails.of(request.model.digest)) is not None
                and request.may_run_twice
            ):
                self._timer = asyncio.get_running_loop().call_later(patience, self.on_event, None)
            self._attempt(candidate, limit, considered, "retry" if self._attempts > 1 else "first")
            return
        raise self._no_answer()

    def _next(self) -> Candidate | None:
        candidate = next(self._order, None)
        if candidate is None and self._admitted and self._full:
            full = self._full.pop(0)
            return Candidate(full.member, full.rank, full.member.can_run(self.request.model).reason, full.bound)
        return candidate

    def _skip(self, candidate: Candidate, reason: str) -> None:
        self._considered.append(Consideration(candidate, reason))
        self._skipped.append(f"{candidate.member.worker_id}: {reason}")

    def _attempt(
        self, candidate: Candidate, limit: ConcurrencyLimit, considered: tuple[Consideration, ...], kind: str
    ) -> None:
        attempt = _Attempt(self, candidate, considered, kind, limit)
        self._under_way.append(attempt)
        attempt.begin()

    def _hedge(self) -> None:
        """Makes a second attempt at the next worker below its limit, if the retry budget allows."""
        if self._ended or not self._under_way:
            return
        request, parts = self.request, self.parts
        for candidate in self._order:
            limit = parts.limits.of(candidate.member.address, request.model.digest)
            if not candidate.reason and limit.admits(request.caller.priority):
                if parts.retries.take():
                    self._attempt(candidate, limit, (Consideration(candidate, ""),), HEDGE)
                return

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_answer(self) -> RingmeshError:
        if self._failure is not None:
            return from_failure(self._failure)
        if self._full and not self._admitted:
            return self.parts.shed(self.request.model, self.request.caller, self._skipped)
        kind = "worker_lost" if self._attempts else "no_worker"
        return UnavailableError(self._unanswered(join_reasons(self._skipped)), kind=kind)

    def _unanswered(self, why: str) -> str:
        return f"no worker could answer for model {self.request.model.name!r}, retry later; {why}"


class _Attempt:
    """One attempt at one worker. It counts against `limit` until it ends or is cancelled."""

    def __init__(
        self,
        attempts: Attempts,
        candidate: Candidate,
        considered: tuple[Consideration, ...],
        kind: str,
        limit: ConcurrencyLimit,
    ) -> None:
        self._attempts = attempts
        self._parts = attempts.parts
        self._request = attempts.request
        self.candidate = candidate
        self._considered = considered
        self.kind = kind
        self._limit = limit
        self._item: EnvelopeItem | None = None
        self._outcome: ItemOutcome | None = None
        self._span_id = new_span_id()
        self._start = time.time_ns()
        self._began = time.monotonic()
        self._begun = limit.begin()
        self._is_open = True

    def begin(self) -> None:
        request = self._request
        traceparent, is_alone = request.trace.traceparent(self._span_id), request.model.limits_queue
        self._item = item = EnvelopeItem(
            request.data, request.request_hash, request.deadline, traceparent, self._answered, is_alone=is_alone
        )
        self.candidate.member.link.send(request.model.digest, item)

    def _answered(self, outcome: ItemOutcome) -> None:
        self._outcome = outcome
        self._attempts.on_event(self)

    def cancel(self) -> None:
        """Withdraws the attempt. Raises nothing: the request has its answer, or needs none."""
        if not self._is_open:
            return
        self._release()
        try:
            if self._item is not None:
                self.candidate.member.link.withdraw(self._item)
            if self._request.model.hedged:
                self._parts.tails.observe(self._request.model.digest, time.monotonic() - self._began)
            self._record(None, "nobody waits for it any more")
        except Exception as error:
            internal(log, "an attempt could not be cancelled", error, self._request.trace.trace_id)

    def end(self) -> ItemOutcome:
        """The outcome of an attempt that has ended. Releases its limit; records statistics, metrics and the span."""
        outcome = self._outcome
        assert outcome is not None
        try:
            error = self._learn(outcome)
        finally:
            self._release()
        if isinstance(outcome, inference_pb2.WorkResult | SplitResult):
            self._record(message_of(outcome), error)
        else:
            self._record(None, error)
        return outcome

    def _release(self) -> None:
        self._is_open = False
        self._limit.end()

    def _learn(self, outcome: ItemOutcome) -> str:
        """Updates the statistics of the worker. Returns the error message, "" if there is none."""
        took = time.monotonic() - self._began
        parts, model, member = self._parts, self._request.model, self.candidate.member
        if isinstance(outcome, inference_pb2.WorkResult | SplitResult):
            parts.fleet.answered(member, model.digest, took)
            timing = outcome.timing
            if not timing.joined:
                self._limit.completed(self._begun, took, timing.compute_us / 1e6)
            if model.hedged:
                parts.tails.observe(model.digest, took)
            return outcome.failure.message if outcome.HasField("failure") else ""
        if isinstance(outcome, RingmeshError):
            self._limit.completed(self._begun, took, 0.0)
            return outcome.message
        parts.fleet.failed(member, outcome)
        return str(outcome)

    def _record(self, result: inference_pb2.WorkResult | None, error: str) -> None:
        candidate = self.candidate
        worker, code = candidate.member.worker_id, code_name(result)
        # The clock may have been set back meanwhile.
        end = max(self._start, time.time_ns())
        self._parts.metrics.attempted(worker, self.kind, code, end - self._start)
        self._request.trace.span(
            EXECUTE,
            self._start,
            end,
            Attempted(candidate.member, candidate.rank, code, result, self._considered),
            self._span_id,
            kind=Kind.CLIENT,
            error=error,
            worker=worker,
            worker_type=candidate.member.worker_type,
            result=result,
        )


def no_room(limit: ConcurrencyLimit) -> str:
    return f"has {limit.in_flight} requests under way, as many as it can answer"


def join_reasons(skipped: list[str]) -> str:
    return "; ".join(skipped[:MAX_NAMED])
