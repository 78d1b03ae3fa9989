"""Sends requests to the fleet, within what it can take."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import random
import threading
from collections.abc import Callable, Iterator

from router.accounting.dispatch_metrics import RETRIES_DENIED, SHEDS, DispatchMetrics
from router.admission.caller import ANYBODY, Caller, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimits
from router.balancing.catalog import ModelEntry
from router.balancing.member import Member
from router.dispatch.attempts import TOLD, Answered, Asked, Dispatch, Parts, Workers, no_room, told
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from services.runtime.large_result import Result
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import forgotten
from services.runtime.telemetry.tracing import Trace


class Dispatcher:
    """Runs requests on the workers of `fleet`, within `limits` on what is under way to each, and `retries`.

    Where a model says so, one that takes longer than most of its kind, by `tails`, is asked of a second worker too.
    """

    def __init__(self, fleet: Workers, limits: ConcurrencyLimits, retries: RetryBudget, tails: TailLatency) -> None:
        self._metrics = DispatchMetrics()
        self._parts = Parts(fleet, limits, retries, tails, self._metrics, self._shed)
        self._sheds = 0
        self._shedding = threading.Lock()

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield from self._metrics.samples()
        yield Sample(RETRIES_DENIED, (), self._parts.retries.denied)
        yield forgotten("tail latencies", self._parts.tails.models)
        yield Sample(SHEDS, ("overload",), self._sheds)

    def begin(self, asked: Asked, done: Callable[[Answered | Exception], None]) -> Dispatch:
        """Runs it; `done` hears the first answer that a worker gives and who gave it, or, perhaps at once, the error.

        That is the worker's own, RefusedError where all have enough to do, or UnavailableError where nobody could be
        reached.
        """
        dispatch = Dispatch(self._parts, asked, done)
        dispatch.start()
        return dispatch

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
    ) -> tuple[Result, Member]:
        """As `begin`. Raises the error; cancelled, it is withdrawn."""
        ended: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()

        def done(end: Answered | Exception) -> None:
            if ended.done():
                return
            if isinstance(end, Exception):
                ended.set_exception(end)
            else:
                ended.set_result(end)

        dispatch = self.begin(Asked(model, request, place, request_hash, deadline, caller, trace), done)
        try:
            return await ended
        except asyncio.CancelledError:
            dispatch.cancel()
            raise

    def refusal(self, model: ModelEntry, caller: Caller) -> RefusedError | None:
        """What a request would end with now for want of room, before anything is done for it. Any thread.

        None where somebody has room, or nobody could be asked. Not for the step of a sequence, which is not refused.
        """
        skipped: list[str] = []
        for member in self._parts.fleet.view.members.values():
            if not member.why_not(model):
                limit = self._parts.limits.known(member.address, model.digest)
                if limit is None or limit.admits(caller.priority):
                    return None
                if len(skipped) < TOLD:
                    skipped.append(f"{member.worker_id}: {no_room(limit)}")
        return self._shed(model, caller, skipped) if skipped else None

    def _shed(self, model: ModelEntry, caller: Caller, skipped: list[str]) -> RefusedError:
        with self._shedding:
            self._sheds += 1
        return RefusedError(
            f"overloaded: no worker can take more of model {model.name!r} now, retry later; {told(skipped)}",
            caller,
            # Spread, so that those who are told so at once do not come back at once.
            retry_after=self._parts.limits.target * random.uniform(0.5, 1.5),
        )
