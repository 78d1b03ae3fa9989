import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balancing.picker import candidates
from router.balancing.pool import BALANCE, FLOOR
from tests.unit.router.fleets import MODEL, member, view

PLACE = b"\x12\x34" + bytes(14)
NAMES = [f"w{index}" for index in range(20)]


def fleet(count=20, **changes):
    return view([member(name, **changes.get(name, {})) for name in NAMES[:count]])


def order(seen, place=PLACE, **options):
    return [candidate.member.address for candidate in candidates(seen, MODEL, place, **options) if not candidate.reason]


def taken(seen, place=PLACE, **options):
    return next(candidate.member for candidate in candidates(seen, MODEL, place, **options) if not candidate.reason)


def send(seen, place, **options):
    chosen = taken(seen, place, **options)
    chosen.load.sent()
    return chosen


def test_the_order_is_the_rings_and_names_every_worker_once():
    seen = fleet()
    assert tuple(order(seen)) == seen.ring.order(PLACE)


def test_a_worker_that_cannot_run_an_ensemble_says_which_step_is_at_fault():
    one = member("w0")
    one.partly = {(MODEL.name, MODEL.version): "step 's' is an ensemble; a step must be a model"}
    assert one.can_run(MODEL).reason == "cannot run the ensemble: step 's' is an ensemble; a step must be a model"
    assert view([one]).pools == {}


def test_who_is_passed_over_keeps_its_rank_and_says_why():
    seen = fleet(w3={"reason": "draining"}, w4={"holds": False})
    told = {c.member.address: (c.reason, c.rank) for c in candidates(seen, MODEL, PLACE)}
    place_of = seen.ring.order(PLACE).index
    assert told["w3"] == ("draining", place_of("w3"))
    assert told["w4"][0] == "does not hold the model"
    assert all(reason == "" for name, (reason, _) in told.items() if name not in ("w3", "w4"))


@pytest.mark.parametrize("place", [PLACE, b""])
def test_workers_that_have_the_model_in_memory_come_before_those_that_would_load_it(place):
    ranked = fleet().ring.order(PLACE)
    seen = fleet(**{ranked[0]: {"loaded": False}, ranked[2]: {"loaded": False}})
    assert set(order(seen, place)[-2:]) == {ranked[0], ranked[2]}
    assert len(order(seen, place)) == 20


def test_what_a_sequence_has_built_up_is_on_its_owner_whatever_is_in_memory_there():
    owner = fleet().ring.order(PLACE)[0]
    assert order(fleet(**{owner: {"loaded": False}}), sticky=True)[0] == owner


def test_a_request_for_any_place_is_not_always_sent_to_the_same_worker():
    seen = fleet()
    assert len({taken(seen, b"").address for _ in range(200)}) > 10


def test_the_only_holders_of_a_model_are_found_past_the_ranks_in_the_order_of_the_ring():
    ring = fleet().ring
    holders = ring.order(PLACE)[-3:]
    seen = fleet(**{name: {"holds": False} for name in NAMES if name not in holders})
    assert tuple(order(seen)) == holders


def test_an_owner_at_its_bound_is_passed_over_for_the_next_and_asked_after_all_others():
    seen = fleet(3)
    owner, second, third = seen.ring.order(PLACE)
    for _ in range(FLOOR):
        assert send(seen, PLACE).address == owner
    assert order(seen) == [second, third, owner]
    last = [*candidates(seen, MODEL, PLACE)][-1]
    assert (last.is_full, last.bound) == (True, FLOOR)


def test_equal_keys_meet_at_their_owner_while_the_fleet_has_next_to_nothing_to_do():
    seen = fleet(3)
    assert {send(seen, PLACE).address for _ in range(FLOOR)} == {seen.ring.order(PLACE)[0]}


def test_a_sequence_stays_with_its_owner_whatever_its_load():
    seen = fleet(3)
    assert {send(seen, PLACE, sticky=True).address for _ in range(50)} == {seen.ring.order(PLACE)[0]}


WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=12)
PLACES = st.lists(st.one_of(st.just(PLACE), st.just(b""), st.binary(min_size=2, max_size=2)), max_size=300)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, PLACES, st.randoms(use_true_random=False))
def test_no_worker_is_ever_pushed_above_its_bound(weights, places, random):
    """Half of the places are one hot key or any at all; some requests end in between."""
    seen = view([member(f"w{index}", weight=weight) for index, weight in enumerate(weights)])
    total, outstanding = sum(weights), []
    for place in places:
        if outstanding and random.random() < 0.3:
            outstanding.pop(random.randrange(len(outstanding))).load.ended()
        chosen = send(seen, place)
        outstanding.append(chosen)
        fair = len(outstanding) * chosen.weight / total
        assert chosen.load.outstanding <= max(FLOOR, math.ceil(BALANCE * fair))


def test_load_that_others_brought_counts_towards_the_bound():
    from ringmesh.inference.v1 import inference_pb2

    seen = fleet(3)
    owner, second, _ = seen.ring.order(PLACE)
    seen.members[owner].load.reported(inference_pb2.LoadReport(requests=30, estimated_wait_us=300), 0)
    assert order(seen)[0] == second
    seen.members[owner].load.reported(inference_pb2.LoadReport(requests=0), 0)
    assert order(seen)[0] == owner


def test_of_two_at_random_the_one_with_the_shorter_wait_is_asked():
    from ringmesh.inference.v1 import inference_pb2

    seen = fleet(2)
    seen.members["w0"].load.reported(inference_pb2.LoadReport(requests=3, estimated_wait_us=900_000), 0)
    seen.members["w1"].load.reported(inference_pb2.LoadReport(requests=4, estimated_wait_us=4_000), 0)
    assert {taken(seen, b"").address for _ in range(50)} == {"w1"}


def test_a_newcomer_is_asked_for_a_tenth_of_its_share():
    seen = fleet(2)
    newcomer = seen.members["w0"]
    newcomer.ramp = 0.1
    seen = view([*seen.members.values()])
    counts = Counter(send(seen, number.to_bytes(2, "big")).address for number in range(0, 60000, 600))
    assert 0 < counts["w0"] <= math.ceil(BALANCE * 100 * 0.1 / 1.1)


def test_an_ejected_worker_is_asked_only_when_all_others_failed():
    owner = fleet(3).ring.order(PLACE)[0]
    seen = fleet(3, **{owner: {"ejected": "slow"}})
    assert order(seen)[-1] == owner
    assert len(order(seen)) == 3


def test_an_ejected_worker_is_asked_where_it_alone_holds_the_model():
    changes = {name: {"holds": False} for name in NAMES[:3]}
    seen = fleet(3, **{**changes, "w1": {"ejected": "slow"}})
    assert order(seen) == ["w1"]


REGIONS = [member(f"{region}{index}", region=region) for region in ("eu", "us") for index in range(3)]


@pytest.mark.parametrize("place", [PLACE, b""])
def test_workers_of_the_own_region_come_first(place):
    assert [name[:2] for name in order(view(REGIONS, region="eu"), place)] == ["eu"] * 3 + ["us"] * 3


def test_a_region_without_a_worker_that_can_answer_asks_the_others():
    away = [member(f"eu{index}", region="eu", reason="draining") for index in range(3)]
    assert {name[:2] for name in order(view([*away, *REGIONS[3:]], region="eu"))} == {"us"}


def test_routers_of_one_region_agree_whatever_their_zone():
    seen = [view(REGIONS, region="eu", zone=zone) for zone in "ab"]
    assert order(seen[0]) == order(seen[1])


def test_what_is_not_cached_is_asked_in_the_own_zone():
    seen = view([member(f"{zone}{index}", zone=zone) for zone in "ab" for index in range(3)], zone="b")
    assert {taken(seen, b"").zone for _ in range(50)} == {"b"}
