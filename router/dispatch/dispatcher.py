"""Sends requests to the fleet, within what it can take."""

from __future__ import annotations  # compiled by mypyc

import random
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from router.accounting.dispatch_metrics import RETRIES_DENIED, SHEDS, DispatchMetrics
from router.admission.caller import Caller, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimits
from router.balancing.catalog import ModelEntry
from router.dispatch.attempts import TOLD, Answered, Asked, Attempts, Parts, Workers, no_room, told
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import forgotten


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

    def run(self, asked: Asked) -> Coroutine[Any, Any, Answered]:
        """As Attempts.run, to be driven."""
        return Attempts(self._parts, asked).run()

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
