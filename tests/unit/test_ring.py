import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ring import RANKS, SLOTS, Ring

MEMBERS = st.sets(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=12)
EVERY_SLOT = [slot.to_bytes(2, "big") for slot in range(SLOTS)]


def owners(ring: Ring) -> list[str]:
    return [ring.ranked(key)[0] for key in EVERY_SLOT]


@settings(max_examples=10, deadline=None)
@given(MEMBERS, st.data())
def test_removing_a_member_moves_only_its_keys(members, data):
    leaving = data.draw(st.sampled_from(sorted(members)))
    before = owners(Ring(dict.fromkeys(members, 1.0)))
    after = owners(Ring(dict.fromkeys(members - {leaving}, 1.0)))
    moved = {old for old, new in zip(before, after, strict=True) if old != new}
    assert moved <= {leaving}


@settings(max_examples=10, deadline=None)
@given(MEMBERS)
def test_a_key_of_a_lost_owner_goes_to_the_next_in_its_rank(members):
    ring = Ring(dict.fromkeys(members, 1.0))
    key = os.urandom(16)
    first, second = ring.ranked(key)[:2]
    assert Ring(dict.fromkeys(members - {first}, 1.0)).ranked(key)[0] == second


@settings(max_examples=10, deadline=None)
@given(MEMBERS)
def test_adding_a_member_takes_its_share_and_moves_nothing_between_others(members):
    before = owners(Ring(dict.fromkeys(members, 1.0)))
    after = owners(Ring(dict.fromkeys(members | {"newcomer"}, 1.0)))
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"newcomer"}
    assert len(moved) / SLOTS == pytest.approx(1 / (len(members) + 1), rel=0.1)


@pytest.mark.parametrize("count", [3, 30])
def test_shares_are_balanced(count):
    ring = Ring({f"10.0.0.{index}:8100": 1.0 for index in range(count)})
    shares = np.array([ring.share(member) for member in ring.members])
    assert shares.sum() == pytest.approx(1)
    assert shares.max() * count < 1.1


def test_a_member_of_twice_the_weight_owns_twice_as_much():
    ring = Ring({"a": 1.0, "b": 2.0, "c": 1.0})
    assert ring.share("b") == pytest.approx(0.5, rel=0.05)


def test_rings_agree_whatever_the_order_of_their_members():
    names = [f"worker-{index}" for index in range(9)]
    assert owners(Ring(dict.fromkeys(names, 1.0))) == owners(Ring(dict.fromkeys(reversed(names), 1.0)))


def test_a_rank_names_each_member_once_and_ends_at_eight():
    ranked = Ring({f"worker-{index}": 1.0 for index in range(20)}).ranked(b"\x12\x34")
    assert len(set(ranked)) == len(ranked) == RANKS


def test_an_empty_ring_has_no_owner():
    assert Ring({}).ranked(b"\x00\x00") == ()


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        Ring({"a": 0.0})


def test_slots_are_spread_as_keys_are():
    ring = Ring({f"worker-{index}": 1.0 for index in range(5)})
    counts = Counter(ring.ranked(os.urandom(16))[0] for _ in range(20_000))
    assert max(counts.values()) / (20_000 / 5) < 1.1
