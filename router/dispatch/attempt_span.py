"""The span of an attempt: the worker it went to, and why that worker was chosen."""

from __future__ import annotations  # compiled by mypyc

import time

from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Member
from router.balancing.picker import Candidate
from services.runtime.errors import CODE_NAMES
from services.runtime.telemetry.spans import Event, Value
from services.runtime.telemetry.worker_spans import EXECUTE


class Consideration:
    """A worker that is considered for an attempt now, its load, and why it is skipped ("": it is chosen)."""

    def __init__(self, candidate: Candidate, skipped: str) -> None:
        self.candidate = candidate
        self.skipped = skipped
        self.outstanding = candidate.member.load.outstanding
        self.at_ns = time.time_ns()

    def event(self) -> Event:
        member = self.candidate.member
        return Event(
            "ringmesh.candidate",
            self.at_ns,
            {
                "ringmesh.worker.id": member.worker_id,
                "ringmesh.rank": self.candidate.rank,
                "ringmesh.load": self.outstanding,
                "ringmesh.bound": self.candidate.bound,
                "ringmesh.taken": not self.skipped,
                "ringmesh.reason": self.skipped or ("next in rank" if self.candidate.rank else "the owner of the key"),
            },
        )


def at_bound(candidate: Candidate) -> Consideration:
    """The Consideration of a worker at its bound, which comes after all others."""
    outstanding = candidate.member.load.outstanding
    return Consideration(candidate, f"it has {outstanding} requests, and is bound to {candidate.bound}")


class Attempted:
    """The data of an attempt's span; the span is built only if the trace is retained. `code`: name of the gRPC code."""

    def __init__(
        self,
        member: Member,
        rank: int,
        code: str,
        result: inference_pb2.WorkResult | None,
        considered: tuple[Consideration, ...],
    ) -> None:
        self.member = member
        self.rank = rank
        self.code = code
        self.result = result
        self.considered = considered

    def events(self) -> tuple[Event, ...]:
        return tuple([considered.event() for considered in self.considered])

    def attributes(self) -> dict[str, Value]:
        """Follows the OpenTelemetry semantic conventions for RPC client spans."""
        member, result = self.member, self.result
        host, _, port = member.address.rpartition(":")
        attributes: dict[str, Value] = {
            "rpc.system.name": "grpc",
            "rpc.method": EXECUTE,
            "rpc.response.status_code": self.code,
            "server.address": host,
            "server.port": int(port) if port.isdecimal() else 0,
            "ringmesh.worker.id": member.worker_id,
            "ringmesh.rank": self.rank,
        }
        if self.code != "OK":
            attributes["error.type"] = self.code
        if result is not None and result.timing.queue_us:
            attributes["ringmesh.queue_us"] = result.timing.queue_us
            attributes["ringmesh.compute_us"] = result.timing.compute_us
        return attributes


def code_name(result: inference_pb2.WorkResult | None) -> str:
    """The name of the gRPC code of a result; UNAVAILABLE if there is none."""
    return "UNAVAILABLE" if result is None else CODE_NAMES.get(result.failure.code, "UNKNOWN")
