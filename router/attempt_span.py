"""What the span of an attempt says: whom it asked, and why that one."""

from __future__ import annotations

import time

import grpc
from ringmesh.inference.v1 import inference_pb2

from router.member import Member
from router.picker import Candidate
from services.runtime.spans import Event, Value
from services.runtime.worker_spans import EXECUTE

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def consideration(candidate: Candidate, passed_over: str) -> Event:
    """An event for each worker that was considered: its rank, its load, and why it was passed over ("": it was not)."""
    member = candidate.member
    return Event(
        "ringmesh.candidate",
        time.time_ns(),
        {
            "ringmesh.worker.id": member.worker_id,
            "ringmesh.rank": candidate.rank,
            "ringmesh.load": member.load.outstanding,
            "ringmesh.bound": candidate.bound,
            "ringmesh.taken": not passed_over,
            "ringmesh.reason": passed_over or ("next in rank" if candidate.rank else "the owner of the key"),
        },
    )


def at_bound(candidate: Candidate) -> Event:
    """Of one that is put off until all others were asked."""
    return consideration(
        candidate, f"it has {candidate.member.load.outstanding} requests, and is bound to {candidate.bound}"
    )


def attempt_attributes(member: Member, rank: int, result: inference_pb2.WorkResult | None) -> dict[str, Value]:
    """As the semantic conventions for RPC have it for a client's span; `result` is None where none came."""
    host, _, port = member.address.rpartition(":")
    code = _CODES.get(result.failure.code, "UNKNOWN") if result is not None else "UNAVAILABLE"
    attributes: dict[str, Value] = {
        "rpc.system.name": "grpc",
        "rpc.method": EXECUTE,
        "rpc.response.status_code": code,
        "server.address": host,
        "server.port": int(port) if port.isdecimal() else 0,
        "ringmesh.worker.id": member.worker_id,
        "ringmesh.rank": rank,
    }
    if code != "OK":
        attributes["error.type"] = code
    if result is not None and result.timing.queue_us:
        attributes["ringmesh.queue_us"] = result.timing.queue_us
        attributes["ringmesh.compute_us"] = result.timing.compute_us
    return attributes
