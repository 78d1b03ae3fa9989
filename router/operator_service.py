"""`ringmesh.router.v1.RouterService`: how operators look into a router."""

from __future__ import annotations

from itertools import islice

from ringmesh.router.v1 import router_pb2

from cache.keys import RequestHasher, UncacheableError, cache_key
from router.fleet import Fleet
from router.picker import candidates
from router.ring import RANKS
from services.runtime.rpc import Context, Service, unary


class OperatorService:
    """GetRing and Explain, from the same view that requests see."""

    def __init__(self, fleet: Fleet, hasher: RequestHasher) -> None:
        self._fleet = fleet
        self._hasher = hasher

    def service(self) -> Service:
        """The handlers, to be served."""
        return Service(
            router_pb2.DESCRIPTOR.services_by_name["RouterService"],
            {
                "GetRing": unary(router_pb2.GetRingRequest, self._get_ring),
                "Explain": unary(router_pb2.ExplainRequest, self._explain),
            },
        )

    async def _get_ring(self, _: router_pb2.GetRingRequest, __: Context) -> router_pb2.GetRingResponse:
        view = self._fleet.view
        return router_pb2.GetRingResponse(
            workers=[
                router_pb2.Worker(
                    id=member.worker_id,
                    address=member.address,
                    healthy=member.healthy,
                    reason=member.reason,
                    in_flight=member.link.in_flight,
                    share=view.ring.share(member.address),
                    models=[f"{name}/{version}" for name, version in sorted(member.held)],
                )
                for member in view.members.values()
            ]
        )

    async def _explain(self, request: router_pb2.ExplainRequest, _: Context) -> router_pb2.ExplainResponse:
        view = self._fleet.view
        model = view.catalog.find(request.request.model_name, request.request.model_version)
        try:
            if model.uncacheable:
                raise UncacheableError(model.uncacheable)
            tenant = request.tenant if model.tenant_scoped else None
            request_hash = self._hasher.hash(request.request, model.outputs, tenant)
        except UncacheableError as why:
            return router_pb2.ExplainResponse(uncached_reason=f"{why}; any worker that holds the model may be asked")
        response = router_pb2.ExplainResponse(key=cache_key(model.digest, request_hash).hex())
        chosen = False
        for candidate in islice(candidates(view, model, request_hash), RANKS):
            take = not candidate.reason and not chosen
            chosen = chosen or take
            response.candidates.add(
                worker_id=candidate.member.worker_id,
                rank=candidate.rank,
                chosen=take,
                reason=candidate.reason or ("first that can answer" if take else "asked if those before it fail"),
            )
        return response
