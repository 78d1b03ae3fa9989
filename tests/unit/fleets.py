"""Fleets for unit tests: real members and pools, no connections."""

from router.catalog import Catalog, ModelEntry
from router.fleet import FleetView, Locality
from router.load import WorkerLoad, pools
from router.member import Member
from router.membership import Listing
from router.ring import Ring

MODEL = ModelEntry("m", "1", b"d" * 16, "", None)


def member(address, *, link=None, reason="", holds=True, ejected="", loaded=True, **listing):
    made = Member(Listing(address, **listing), link, WorkerLoad())
    made.reason = reason
    made.ejected = ejected
    made.held = frozenset({("m", "1")} if holds else ())
    made.unloaded = frozenset(() if loaded else made.held)
    return made


def view(members, *, region="", zone=""):
    by_address = {made.address: made for made in members}
    locality = Locality(region, zone)
    rings = [
        Ring({made.address: made.weight for made in members if locality.is_far(made) == far}) for far in (False, True)
    ]
    by_model = pools(members, locality.is_far, zone)
    return FleetView(rings[0], by_address, Catalog([]), rings[1], by_model)
