"""Largest remainder."""

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.money import apportioned, rounded


@given(st.lists(st.integers(0, 10**24), min_size=1, max_size=50), st.integers(0, 10**18))
def test_parts_add_up_to_the_total_and_none_is_off_by_one(weights, total):
    parts = apportioned(weights, total if any(weights) else 0)
    assert sum(parts) == (total if any(weights) else 0)
    for weight, part in zip(weights, parts, strict=True):
        if sum(weights):
            assert weight * total // sum(weights) <= part <= weight * total // sum(weights) + 1


def test_what_is_left_goes_to_the_largest_remainders():
    assert apportioned([5, 3, 2, 2], 10) == [4, 2, 2, 2]
    assert apportioned([1, 1, 1], 1) == [1, 0, 0]


def test_halves_are_rounded_up():
    assert [rounded(numerator, 2) for numerator in (0, 1, 2, 3)] == [0, 1, 1, 2]
