"""What the span of an attempt says: whom it asked, and why that one."""

from __future__ import annotations  # compiled by mypyc

import time

import grpc
from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Member
from router.balancing.picker import Candidate
from services.runtime.telemetry.spans import Event, Value
from services.runtime.telemetry.worker_spans import EXECUTE

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Consideration:
    """A worker that was considered, what it had to do, and why it was passed over ("": it was not). By time.time_ns."""

    __slots__ = ("at_ns", "candidate", "outstanding", "passed_over")

    def __init__(self, candidate: Candidate, passed_over: str, outstanding: int, at_ns: int) -> None:
        self.candidate = candidate
        self.passed_over = passed_over
        self.outstanding = outstanding
        self.at_ns = at_ns

    def event(self) -> Event:
        """Of the attempt's span."""
        member = self.candidate.member
        return Event(
            "ringmesh.candidate",
            self.at_ns,
            {
                "ringmesh.worker.id": member.worker_id,
                "ringmesh.rank": self.candidate.rank,
                "ringmesh.load": self.outstanding,
                "ringmesh.bound": self.candidate.bound,
                "ringmesh.taken": not self.passed_over,
                "ringmesh.reason": self.passed_over
                or ("next in rank" if self.candidate.rank else "the owner of the key"),
            },
        )


def consideration(candidate: Candidate, passed_over: str) -> Consideration:
    """As of now."""
    return Consideration(candidate, passed_over, candidate.member.load.outstanding, time.time_ns())


def at_bound(candidate: Candidate) -> Consideration:
    """Of one that is put off until all others were asked."""
    return consideration(
        candidate, f"it has {candidate.member.load.outstanding} requests, and is bound to {candidate.bound}"
    )


class Attempted:
    """What the span says. It is built when the trace is kept, which few are. `code` is of gRPC, by name."""

    __slots__ = ("code", "considered", "member", "rank", "result")

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
        """Who was considered."""
        return tuple([considered.event() for considered in self.considered])

    def attributes(self) -> dict[str, Value]:
        """As the semantic conventions for RPC have it for a client's span."""
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
    """UNAVAILABLE where none came."""
    if result is None:
        return "UNAVAILABLE"
    return _CODES.get(result.failure.code, "UNKNOWN") if result.HasField("failure") else "OK"
