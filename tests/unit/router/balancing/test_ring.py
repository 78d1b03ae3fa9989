import math
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balancing.ring import RANKS, SLOTS, Ring

NAMES = st.text("abcdefgh", min_size=1, max_size=4)
MEMBERS = st.dictionaries(NAMES, st.sampled_from([0.25, 1.0, 1.5, 4.0]), min_size=2, max_size=12)
# Every eighth slot: the laws hold for each, and so many show it.
SOME = [slot.to_bytes(2, "big") for slot in range(0, SLOTS, 8)]


def owners(ring: Ring) -> list[str]:
    return [ring.ranked(key)[0] for key in SOME]


def spread(share: float) -> float:
    """Five standard deviations of what a member owns of these slots: the excess that the laws allow."""
    return 5 * math.sqrt(share * (1 - share) / len(SOME))


@settings(max_examples=10, deadline=None)
@given(MEMBERS, st.data())
def test_removing_a_member_moves_only_its_keys(members, data):
    leaving = data.draw(st.sampled_from(sorted(members)))
    before = owners(Ring(members))
    after = owners(Ring({name: weight for name, weight in members.items() if name != leaving}))
    moved = {old for old, new in zip(before, after, strict=True) if old != new}
    assert moved <= {leaving}


@settings(max_examples=10, deadline=None)
@given(MEMBERS)
def test_a_key_of_a_lost_owner_goes_to_the_next_in_its_rank(members):
    ring = Ring(members)
    key = os.urandom(16)
    first, second = ring.ranked(key)[:2]
    assert Ring({name: weight for name, weight in members.items() if name != first}).ranked(key)[0] == second


@settings(max_examples=10, deadline=None)
@given(MEMBERS, st.sampled_from([0.5, 1.0, 3.0]))
def test_adding_a_member_moves_its_share_to_it_and_nothing_between_others(members, weight):
    before = owners(Ring(members))
    after = owners(Ring({**members, "newcomer": weight}))
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    share = weight / (sum(members.values()) + weight)
    assert set(moved) == {"newcomer"}
    assert len(moved) / len(SOME) == pytest.approx(share, abs=spread(share))


@settings(max_examples=10, deadline=None)
@given(MEMBERS)
def test_members_own_by_their_weights(members):
    ring = Ring(members)
    for name, weight in members.items():
        share = weight / sum(members.values())
        assert ring.share(name) == pytest.approx(share, abs=spread(share))


@settings(max_examples=10, deadline=None)
@given(MEMBERS, st.sampled_from([0.5, 2.0]))
def test_a_changed_weight_moves_keys_only_to_or_from_who_changed(members, factor):
    changed = min(members)
    before = owners(Ring(members))
    after = owners(Ring({**members, changed: members[changed] * factor}))
    moved = [{old, new} for old, new in zip(before, after, strict=True) if old != new]
    assert all(changed in pair for pair in moved)


@settings(max_examples=10, deadline=None)
@given(MEMBERS, st.randoms(use_true_random=False))
def test_routers_agree_whatever_the_order_in_which_they_met_the_members(members, random):
    shuffled = [*members.items()]
    random.shuffle(shuffled)
    assert owners(Ring(members)) == owners(Ring(dict(shuffled)))


@pytest.mark.parametrize("count", [3, 30])
def test_shares_are_balanced(count):
    ring = Ring({f"10.0.0.{index}:8100": 1.0 for index in range(count)})
    shares = np.array([ring.share(member) for member in ring.members])
    assert shares.sum() == pytest.approx(1)
    assert shares.max() * count < 1.1


def test_a_rank_names_each_member_once_and_ends_at_eight():
    ranked = Ring({f"worker-{index}": 1.0 for index in range(20)}).ranked(b"\x12\x34")
    assert len(set(ranked)) == len(ranked) == RANKS


def test_the_whole_order_begins_with_the_ranks_and_names_everybody_once():
    ring = Ring({f"worker-{index}": 1.0 + index % 3 for index in range(20)})
    for key in SOME[::100]:
        order = ring.order(key)
        assert order[:RANKS] == ring.ranked(key)
        assert sorted(order) == sorted(ring.members)


def test_an_empty_ring_has_no_owner():
    assert Ring({}).ranked(b"\x00\x00") == Ring({}).order(b"\x00\x00") == ()


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        Ring({"a": 0.0})


def test_slots_are_spread_as_keys_are():
    ring = Ring({f"worker-{index}": 1.0 for index in range(5)})
    counts = Counter(ring.ranked(os.urandom(16))[0] for _ in range(20_000))
    assert max(counts.values()) / (20_000 / 5) < 1.1
