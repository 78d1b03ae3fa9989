"""Shares of what is left, and periods."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.budgets import bounds, share


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**12))
def test_nobody_gets_more_than_what_is_left(left, hard):
    assert 0 <= share(left, hard) <= max(left, 0)


def test_others_find_half_until_crumbs_are_left():
    assert share(1_000_000, 1_000_000) == 500_000
    assert share(999, 1_000_000) == 999
    assert share(-5, 1_000_000) == 0


def test_periods_begin_at_midnight_and_on_the_first():
    now = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert bounds("day", now) == (datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    assert bounds("month", now) == (datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
