"""Sends requests to the fleet, within its concurrency limits."""

from __future__ import annotations  # compiled by mypyc

import random
from collections.abc import Coroutine, Iterator
from typing import Any

from router.accounting.dispatch_metrics import RETRIES_DENIED, SHEDS, DispatchMetrics
from router.admission.caller import Caller, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimits
from router.balancing.catalog import ModelEntry
from router.dispatch.attempts import (
    MAX_NAMED,
    Attempts,
    DispatchParts,
    DispatchRequest,
    DispatchResult,
    Workers,
    join_reasons,
    no_room,
)
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import forgotten


class Dispatcher:
    """Runs requests on the workers of `fleet`, within the concurrency `limits` and the budget of `retries`.

    If a model is hedged, a request slower than the recent p95 (`tails`) is also sent to a second worker.
    """

    def __init__(self, fleet: Workers, limits: ConcurrencyLimits, retries: RetryBudget, tails: TailLatency) -> None:
        self._metrics = DispatchMetrics()
        self._parts = DispatchParts(fleet, limits, retries, tails, self._metrics, self._shed)
        self._sheds = 0

    def samples(self) -> Iterator[Sample]:
        yield from self._metrics.samples()
        yield Sample(RETRIES_DENIED, (), self._parts.retries.denied)
        yield forgotten("tail latencies", self._parts.tails.models)
        yield Sample(SHEDS, ("overload",), self._sheds)

    def run(self, request: DispatchRequest) -> Coroutine[Any, Any, DispatchResult]:
        """As Attempts.run; to be driven."""
        return Attempts(self._parts, request).run()

    def refusal(self, model: ModelEntry, caller: Caller) -> RefusedError | None:
        """The error of a request if all workers are at their limit now, before any work is done for it.

        None if a worker is below its limit, or if no worker can run the model. Not for steps of a sequence, which are
        never refused.
        """
        skipped: list[str] = []
        for member in self._parts.fleet.view.members.values():
            if member.can_run(model):
                limit = self._parts.limits.known(member.address, model.digest)
                if limit is None or limit.admits(caller.priority):
                    return None
                if len(skipped) < MAX_NAMED:
                    skipped.append(f"{member.worker_id}: {no_room(limit)}")
        return self._shed(model, caller, skipped) if skipped else None

    def _shed(self, model: ModelEntry, caller: Caller, skipped: list[str]) -> RefusedError:
        self._sheds += 1
        return RefusedError(
            f"overloaded: no worker can take more of model {model.name!r} now, retry later; {join_reasons(skipped)}",
            caller,
            # Random, so that callers refused at the same time do not retry at the same time.
            retry_after=self._parts.limits.target * random.uniform(0.5, 1.5),
        )
