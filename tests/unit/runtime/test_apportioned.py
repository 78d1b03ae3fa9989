"""Largest remainder."""

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.apportioned import apportioned


@given(st.lists(st.integers(0, 10**24), min_size=1, max_size=64), st.integers(0, 10**18))
def test_parts_add_up_to_the_total_and_none_is_off_by_one(weights, total):
    whole = sum(weights)
    parts = apportioned(weights, total if whole else 0)
    assert sum(parts) == (total if whole else 0)
    for weight, part in zip(weights, parts, strict=True):
        if whole:
            assert weight * total // whole <= part <= weight * total // whole + 1


def test_what_is_left_goes_to_the_largest_remainders():
    assert apportioned([5, 3, 2, 2], 10) == [4, 2, 2, 2]
    assert apportioned([1, 1, 1], 1) == [1, 0, 0]
    assert apportioned([1, 1, 1], 2) == [1, 1, 0]
