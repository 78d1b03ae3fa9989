"""Metrics of the workers as this router sees them."""

from __future__ import annotations

from collections.abc import Iterator

from router.membership.fleet import Fleet
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.recent import forgotten

_WORKER = ("worker",)
HEALTHY = Family(
    "ringmesh_ring_member_healthy", "gauge", "1 if the router sends requests to the worker, 0 otherwise", _WORKER
)
SHARE = Family("ringmesh_ring_member_share_ratio", "gauge", "share of the key space that the worker owns", _WORKER)
LOAD = Family(
    "ringmesh_ring_member_in_flight", "gauge", "unanswered requests that this router sent to the worker", _WORKER
)


def fleet_samples(fleet: Fleet) -> Iterator[Sample]:
    """Samples of the fleet view that requests use."""
    view = fleet.view
    for member in view.members.values():
        worker = (member.worker_id,)
        yield Sample(HEALTHY, worker, member.healthy and not member.ejected)
        yield Sample(SHARE, worker, view.share(member))
        yield Sample(LOAD, worker, member.load.in_flight)
    yield forgotten("usual times", fleet.outliers.usual)
    yield from fleet.ejections.samples()
