"""Sends a request to its owner on the ring, and on to the next where that one cannot be reached or has enough."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from ringmesh.inference.v1 import inference_pb2

from router.admission.caller import ANYBODY, Caller, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimit, ConcurrencyLimits
from router.attempt_span import at_bound, attempt_attributes, consideration
from router.catalog import ModelEntry
from router.dispatch_metrics import ATTEMPT_SECONDS, ATTEMPTS, RETRIES_DENIED, SHEDS
from router.fleet import Fleet
from router.member import Member
from router.picker import Candidate, candidates
from router.retry_budget import RetryBudget
from router.ring import RANKS
from router.tail_latency import TailLatency
from router.worker_link import Work, WorkerLostError, WorkerUnreachableError
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
    from_failure,
)
from services.runtime.metrics import OTHER, Counter, Histogram, Sample
from services.runtime.spans import Event, Kind
from services.runtime.tracing import Trace
from services.runtime.w3c import new_span_id
from services.runtime.worker_spans import EXECUTE

# Failures of this worker, and perhaps not of another.
_UNAVAILABLE = UnavailableError.code.value[0]
_FAILED_PRECONDITION = FailedPreconditionError.code.value[0]
_RESOURCE_EXHAUSTED = ResourceExhaustedError.code.value[0]
_MAX_WORKERS = 200
# Workers that an error says something of; a fleet may be large.
_TOLD = 8
_ELSEWHERE = frozenset((_UNAVAILABLE, _FAILED_PRECONDITION, _RESOURCE_EXHAUSTED))
# A request that kills who runs it would else go through the whole fleet.
MOST_ENDED = 2


class _Asked(NamedTuple):
    """What every attempt of one request is told."""

    model: ModelEntry
    request: bytes
    request_hash: bytes
    deadline: float | None
    trace: Trace


class Dispatcher:
    """Runs requests on the workers of `fleet`, within `limits` on what is under way to each, and `retries`.

    Where a model says so, one that takes longer than most of its kind, by `tails`, is asked of a second worker too.
    """

    def __init__(self, fleet: Fleet, limits: ConcurrencyLimits, retries: RetryBudget, tails: TailLatency) -> None:
        self._fleet = fleet
        self._limits = limits
        self._retries = retries
        self._tails = tails
        self._attempts = Counter(ATTEMPTS)
        self._attempt_times: dict[str, Histogram] = {}
        self._sheds = 0
        self._shedding = threading.Lock()

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield from self._attempts.samples()
        for worker, times in self._attempt_times.items():
            yield Sample(ATTEMPT_SECONDS, (worker,), times.buckets())
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
        asked = _Asked(model, request, request_hash, deadline, trace)
        skipped = []
        failure: inference_pb2.Failure | None = None
        full = False
        considered: list[Event] = []
        attempts = ended = 0
        put_off: list[Candidate] = []
        order = candidates(self._fleet.view, model, place, sticky=sticky, put_off=put_off)
        for candidate in order:
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
                why = _no_room(limit)
                considered.append(consideration(candidate, why))
                skipped.append(f"{member.worker_id}: {why}")
                continue
            if not attempts:
                self._retries.request()
            elif not self._retries.take():
                skipped.append("not tried further: too many requests needed retries in the last seconds")
                break
            attempts += 1
            patience = self._tails.of(model.digest) if model.hedged and not sticky else None
            try:
                considered += [at_bound(candidate) for candidate in put_off if candidate.is_full]
                considered.append(consideration(candidate, ""))
                events, considered = tuple(considered), []
                kind = "retry" if attempts > 1 else "first"
                if patience is None:
                    result = await self._attempt(asked, candidate, events, kind)
                else:
                    result, member = await self._hedged(asked, candidate, order, patience, caller, events, kind)
            except WorkerUnreachableError as lost:
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
        if full:
            raise self._shed(model, caller, skipped)
        why = "; ".join(skipped[:_TOLD])
        raise UnavailableError(
            f"no worker could answer for model {model.name!r}, retry later; {why}",
            kind="worker_lost" if attempts else "no_worker",
        )

    def refusal(self, model: ModelEntry, caller: Caller) -> RefusedError | None:
        """What `run` would raise now for want of room, to be known before anything is done for a request. Any thread.

        None where somebody has room, or nobody could be asked. Not for the step of a sequence, which is not refused.
        """
        skipped: list[str] = []
        for member in self._fleet.view.members.values():
            if not member.why_not(model):
                limit = self._limits.known(member.address, model.digest)
                if limit is None or limit.admits(caller.priority):
                    return None
                if len(skipped) < _TOLD:
                    skipped.append(f"{member.worker_id}: {_no_room(limit)}")
        return self._shed(model, caller, skipped) if skipped else None

    def _shed(self, model: ModelEntry, caller: Caller, skipped: list[str]) -> RefusedError:
        with self._shedding:
            self._sheds += 1
        why = "; ".join(skipped[:_TOLD])
        return RefusedError(
            f"overloaded: no worker can take more of model {model.name!r} now, retry later; {why}",
            caller,
            # Spread, so that those who are told so at once do not come back at once.
            retry_after=self._limits.target * random.uniform(0.5, 1.5),
        )

    async def _hedged(
        self,
        asked: _Asked,
        first: Candidate,
        order: Iterator[Candidate],
        patience: float,
        caller: Caller,
        events: tuple[Event, ...],
        kind: str,
    ) -> tuple[inference_pb2.WorkResult, Member]:
        """What `first` says, or, where it takes longer than `patience` seconds, what it or the next says first.

        The other is cancelled: it leaves the queue here or at the worker, unless it runs already. A hedge counts as a
        retry. Raises as `_attempt`.
        """
        under_way = {asyncio.create_task(self._attempt(asked, first, events, kind)): first.member}
        try:
            await asyncio.wait(under_way, timeout=patience)
            if all(not task.done() for task in under_way) and (second := self._spare(asked, order, caller)):
                under_way[asyncio.create_task(self._attempt(asked, second, (consideration(second, ""),), "hedge"))] = (
                    second.member
                )
            pending = set(under_way)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    lost = isinstance(task.exception(), WorkerUnreachableError)
                    if not pending or not (lost or task.result().failure.code in _ELSEWHERE):
                        return task.result(), under_way[task]
            raise AssertionError("one of them is the last")
        finally:
            for task in under_way:
                if not task.cancel() and not task.cancelled():
                    task.exception()  # asyncio shall not report it as never retrieved

    def _spare(self, asked: _Asked, order: Iterator[Candidate], caller: Caller) -> Candidate | None:
        """The next that has room, where the budget has."""
        for candidate in order:
            limit = self._limits.of(candidate.member.address, asked.model.digest)
            if not candidate.reason and limit.admits(caller.priority):
                return candidate if self._retries.take() else None
        return None

    async def _attempt(
        self, asked: _Asked, candidate: Candidate, events: tuple[Event, ...], kind: str
    ) -> inference_pb2.WorkResult:
        """The worker's result, success or failure. Raises WorkerUnreachableError, DeadlineExceededError."""
        member, model, trace = candidate.member, asked.model, asked.trace
        limit = self._limits.of(member.address, model.digest)
        span_id = new_span_id()
        work = Work(asked.request, asked.request_hash, asked.deadline, trace.traceparent(span_id))
        start = time.time_ns()
        began = time.monotonic()
        error = ""
        result = None
        begun = limit.begin()
        try:
            result = await member.link.execute(model.digest, work)
            took = time.monotonic() - began
            self._fleet.answered(member, model.digest, took)
            error = result.failure.message
            if not result.timing.joined:
                limit.completed(begun, took, result.timing.compute_us / 1e6)
            if model.hedged:
                self._tails.observe(model.digest, took)
            return result
        except DeadlineExceededError as late:
            limit.completed(begun, time.monotonic() - began, 0.0)
            error = late.message
            raise
        except WorkerUnreachableError as lost:
            self._fleet.failed(member, lost)
            error = str(lost)
            raise
        except asyncio.CancelledError:
            error = "nobody waits for it any more"
            if model.hedged:
                self._tails.observe(model.digest, time.monotonic() - began)
            raise
        finally:
            limit.end()
            attributes = attempt_attributes(member, candidate.rank, result)
            end = time.time_ns()
            self._times(member.worker_id).observe(end - start)
            self._attempts.add(member.worker_id, kind, str(attributes["rpc.response.status_code"]))
            trace.span(
                EXECUTE,
                start,
                end,
                attributes,
                span_id,
                kind=Kind.CLIENT,
                error=error,
                events=events,
                worker=member.worker_id,
                result=result,
            )

    def _times(self, worker: str) -> Histogram:
        times = self._attempt_times.get(worker)
        if times is None:
            # Workers come and go under new names.
            worker = worker if len(self._attempt_times) < _MAX_WORKERS else OTHER
            times = self._attempt_times.setdefault(worker, Histogram())
        return times


def _no_room(limit: ConcurrencyLimit) -> str:
    return f"has {limit.in_flight} requests under way, as many as it can answer"
