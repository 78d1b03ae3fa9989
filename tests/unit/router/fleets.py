"""Fleets for unit tests: real members and pools, no connections."""

from router.balancing.catalog import Catalog, ModelEntry
from router.balancing.member import Listing, Member
from router.balancing.pool import pools
from router.balancing.ring import Ring
from router.balancing.view import FleetView
from router.transport.worker_load import WorkerLoad
from services.runtime.verdict import YES

MODEL = ModelEntry("m", "1", b"d" * 16, YES, None)


def member(address, *, link=None, reason="", holds=True, ejected="", loaded=True, **listing):
    made = Member(Listing(address, **listing), link, WorkerLoad())
    made.reason = reason
    made.ejected = ejected
    made.held = frozenset({("m", "1")} if holds else ())
    made.unloaded = frozenset(() if loaded else made.held)
    return made


def view(members, *, region="", zone=""):
    by_address = {made.address: made for made in members}
    rings = [
        Ring({made.address: made.weight for made in members if made.is_far(region) == far}) for far in (False, True)
    ]
    assigned = pools(members, region, zone)
    for made in members:
        made.load.sums = tuple(assigned.by_worker.get(made.address, ()))
    return FleetView(rings[0], by_address, Catalog([]), rings[1], assigned.by_model)
