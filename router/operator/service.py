"""`ringmesh.router.v1.RouterService`: lets operators inspect a router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing

import grpc
from ringmesh.router.v1 import router_pb2

from cache.mesh import Mesh
from router.balancing.member import Member
from router.balancing.picker import Candidate, candidates
from router.balancing.view import FleetView
from router.membership.events import Event, make
from router.membership.fleet import Fleet
from router.request.call import Call
from router.request.keyer import Keyer
from services.runtime.errors import RingmeshError
from services.runtime.oip import protocol
from services.runtime.request_limits import check_embedded
from services.runtime.rpc.rpc import Context, Service, abort, unary
from services.runtime.telemetry.tracing import untraced

# Maximum number of candidates in an answer.
_MOST_CANDIDATES = 32
# The wire tag of the field `request` in ExplainRequest.
_REQUEST = 0x0A


class OperatorService:
    """GetRing, Explain and Watch, based on the same fleet view that requests use."""

    def __init__(self, fleet: Fleet, mesh: Mesh, keyer: Keyer) -> None:
        self._fleet = fleet
        self._mesh = mesh
        self._keyer = keyer

    def service(self) -> Service:
        return Service(
            router_pb2.DESCRIPTOR.services_by_name["RouterService"],
            {
                "GetRing": unary(router_pb2.GetRingRequest, self._get_ring),
                "Explain": unary(router_pb2.ExplainRequest, self._explain, lambda data: check_embedded(data, _REQUEST)),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    async def _get_ring(self, _: router_pb2.GetRingRequest, __: Context) -> router_pb2.GetRingResponse:
        view = self._fleet.view
        return router_pb2.GetRingResponse(workers=[_worker(view, member) for member in view.members.values()])

    async def _explain(self, request: router_pb2.ExplainRequest, _: Context) -> router_pb2.ExplainResponse:
        protocol.check_tenant(request.tenant, "tenant")
        view = self._fleet.view
        call = Call(request.request.SerializeToString(), untraced(), (), "Explain", None)
        call.tenant = request.tenant
        model = self._keyer.describe(call)
        ring_hash = call.request_hash or call.ring_hash
        response = router_pb2.ExplainResponse()
        if call.request_hash:
            response.key = (model.digest + call.request_hash).hex()
            key = self._mesh.purges.epochs.key(model.digest, model.name, call.request_hash)
            response.shared_tier = self._mesh.explain(key, call.subject())
        elif call.ring_hash:
            response.uncached_reason = f"{call.reason}; the sequence stays with its owner"
        else:
            response.uncached_reason = f"{call.reason}; the one that would answer first of two at random is asked"
        if ring_hash:
            ring = view.ring if view.ring.members else view.far
            response.owner = view.members[ring.ranked(ring_hash)[0]].worker_id
        eligible: list[Candidate] = []
        skipped: list[Candidate] = []
        for candidate in candidates(view, model, ring_hash, sticky=bool(call.ring_hash)):
            (skipped if candidate.reason else eligible).append(candidate)
        for candidate in [*eligible, *skipped][:_MOST_CANDIDATES]:
            response.candidates.append(_candidate(candidate, chosen=candidate in eligible[:1]))
        return response

    async def _watch(self, _: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._fleet.events.watch(list(_now(self._fleet.members)))) as events:
                async for event in events:
                    yield event.SerializeToString()
        except RingmeshError as error:
            await abort(context, error)


def _worker(view: FleetView, member: Member) -> router_pb2.Worker:
    return router_pb2.Worker(
        id=member.worker_id,
        address=member.address,
        healthy=member.healthy and not member.ejected,
        reason=member.reason or member.ejected,
        in_flight=member.load.in_flight,
        share=view.share(member),
        models=[f"{name}/{version}" for name, version in sorted(member.held)],
        region=member.region,
        zone=member.zone,
        weight=member.weight,
        load=member.load.outstanding,
        estimated_wait_us=int(member.load.wait_us),
        ramp=member.ramp,
    )


def _candidate(candidate: Candidate, *, chosen: bool) -> router_pb2.Candidate:
    member = candidate.member
    load = member.load.outstanding
    if candidate.reason:
        reason = candidate.reason
    elif candidate.is_full:
        reason = f"has {load} outstanding and may have {candidate.bound}; asked if those below their bound fail"
    elif member.ejected:
        reason = f"{member.ejected}; asked if all others fail"
    else:
        reason = "first that can answer" if chosen else "asked if those before it fail"
    return router_pb2.Candidate(
        worker_id=member.worker_id,
        rank=candidate.rank,
        chosen=chosen,
        reason=reason,
        address=member.address,
        region=member.region,
        zone=member.zone,
        load=load,
        bound=candidate.bound,
        estimated_wait_us=int(member.load.wait_us),
    )


def _now(members: Iterable[Member]) -> Iterator[Event]:
    for member in members:
        yield make(Event.KIND_JOINED, member)
        if member.reason == "draining":
            yield make(Event.KIND_DRAINING, member)
        elif reason := member.reason or member.ejected:
            yield make(Event.KIND_EJECTED, member, reason=reason)
        for name, version in sorted(member.held):
            yield make(Event.KIND_MODEL_GAINED, member, model=f"{name}/{version}")
