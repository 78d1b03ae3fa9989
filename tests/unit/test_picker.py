from router.catalog import Catalog, ModelEntry
from router.fleet import FleetView
from router.picker import candidates
from router.ring import Ring

MODEL = ModelEntry("m", "1", b"d" * 16, "", None)
PLACE = b"\x12\x34" + bytes(14)
NAMES = [f"w{index}" for index in range(20)]


class Worker:
    def __init__(self, address, reason=""):
        self.worker_id = self.address = address
        self.unloaded = frozenset()
        self._reason = reason

    def why_not(self, model):
        return self._reason


def fleet(reasons=None):
    members = {name: Worker(name, (reasons or {}).get(name, "")) for name in NAMES}
    return FleetView(Ring(dict.fromkeys(members, 1.0)), members, Catalog([]))


def test_the_order_begins_as_the_ring_ranks_and_names_every_worker_once():
    view = fleet()
    order = [candidate.member.address for candidate in candidates(view, MODEL, PLACE)]
    assert tuple(order[:8]) == view.ring.ranked(PLACE)
    assert sorted(order) == sorted(NAMES)


def test_who_is_passed_over_keeps_its_rank_and_says_why():
    view = fleet({"w3": "draining"})
    told = {candidate.member.address: candidate.reason for candidate in candidates(view, MODEL, PLACE)}
    assert told == {name: "draining" if name == "w3" else "" for name in NAMES}


def test_workers_that_have_the_model_in_memory_come_before_those_that_would_load_it():
    view = fleet()
    ranked = view.ring.ranked(PLACE)
    view.members[ranked[0]].unloaded = view.members[ranked[2]].unloaded = {("m", "1")}
    order = [candidate.member.address for candidate in candidates(view, MODEL, PLACE)]
    assert order[:2] == [ranked[1], ranked[3]]
    assert order[-2:] == [ranked[0], ranked[2]]
    # What a sequence has built up is on its owner, whatever is in memory there.
    sticky = [candidate.member.address for candidate in candidates(view, MODEL, PLACE, sticky=True)]
    assert tuple(sticky[:8]) == ranked


def test_a_request_for_any_place_is_not_always_sent_to_the_same_worker():
    view = fleet()
    assert len({next(candidates(view, MODEL, b"")).member.address for _ in range(200)}) > 10
