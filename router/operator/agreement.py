"""Passes the fleet's decisions to load or unload models on to workers that missed them, and to new workers.

A router that loads or unloads a model on all workers attaches the time of the decision. Each worker keeps the last
decision on each model and lists these decisions in its description. If a worker lacks a fleet decision that another
has, the decision is sent to it. A decision made on one worker alone stays there until a later one of the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from functools import partial

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.balancing.member import Member
from router.membership.decisions import missed_decisions, newest_decisions
from router.membership.fleet import Fleet
from services.runtime.errors import UnavailableError
from services.runtime.oip.protocol import DECIDED_NS, full_name
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_WORKER = "/ringmesh.inference.v1.InferenceWorkerService/"
_PERIOD_SECONDS = 1.0
# Delay until a decision is sent again to a worker that failed to apply it.
_RETRY_SECONDS = 30.0
# Loading may take minutes; the fleet's polls detect a worker that hangs.
LOAD_SECONDS = 600.0


def next_ns(members: Iterable[Member]) -> int:
    """The time of a decision made now: later than all others, even if clocks disagree.

    With random nanoseconds: two routers that decide at once after a decision of a clock ahead must not give both the
    same time.
    """
    known = (decided.decided_unix_ns for member in members for decided in member.decisions)
    return max(time.time_ns(), max(known, default=0) + 1 + random.getrandbits(20))


class Agreement:
    """Compares the decisions that the healthy workers of `fleet` have. `clock` in seconds."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._tried: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        """Compares every second from now on."""
        BACKGROUND.every(_PERIOD_SECONDS, "agreement on models", self.compare)

    def compare(self) -> None:
        """Starts to send each worker the decisions that it lacks."""
        members = [member for member in self._fleet.members if member.healthy]
        newest = newest_decisions(members)
        now = self._clock()
        # A worker that was lost meanwhile is tried again as soon as it is back.
        reachable = {member.address for member in members}
        self._tried = {
            key: tried for key, tried in self._tried.items() if tried > now - _RETRY_SECONDS and key[0] in reachable
        }
        for member in members if newest else ():
            lacking = {
                model: source
                for model, source in missed_decisions(member, newest).items()
                if (member.address, model) not in self._tried
            }
            if lacking and member.address not in self._sending:
                self._sending[member.address] = BACKGROUND.once(
                    "worker decisions", partial(self._send, member, lacking)
                )

    async def _send(self, member: Member, lacking: dict[str, Member]) -> None:
        try:
            for model, source in lacking.items():
                try:
                    await _pass_on(model, source, member)
                    log.info("worker %s has applied the decision of the fleet on model %s", member.worker_id, model)
                except Exception as error:  # a worker's error must not keep the other decisions from it
                    self._tried[member.address, model] = self._clock()
                    log.warning(
                        "worker %s could not apply the decision of the fleet on model %s: %s",
                        member.worker_id,
                        model,
                        error,
                    )
            await self._fleet.describe(member)
        finally:
            del self._sending[member.address]


async def _pass_on(model: str, source: Member, to: Member) -> None:
    """Applies the decision of worker `source` on `to`. Raises RingmeshError, WorkerUnreachableError."""
    query = inference_pb2.GetDecisionRequest(model=model).SerializeToString()
    found = await source.link.call(f"{_WORKER}GetDecision", query, LOAD_SECONDS)
    answer = inference_pb2.GetDecisionResponse.FromString(found)
    if not answer.decision.fleet:
        raise UnavailableError(f"worker {source.worker_id} has since got a decision of its own")
    loads = answer.HasField("load")
    request = answer.load if loads else v2.RepositoryModelUnloadRequest(model_name=model)
    request.parameters[DECIDED_NS].int64_param = answer.decision.decided_unix_ns
    method = "RepositoryModelLoad" if loads else "RepositoryModelUnload"
    await to.link.call(f"/{full_name(method)}", request.SerializeToString(), LOAD_SECONDS)
