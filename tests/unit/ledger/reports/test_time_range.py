"""Ranges as asked and as kept."""

import pytest

from services.ledger.reports import time_range
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.partitions import Retention
from services.ledger.storage.times import DAY_MS, HOUR_MS, MINUTE_MS
from services.runtime.errors import InvalidArgumentError

NOW = 20_000 * DAY_MS + 7 * HOUR_MS + 30 * MINUTE_MS + 5
KEPT = Retention(usage=10, minutes=2, rollups=100)


def test_now_is_rounded_up_so_that_what_just_happened_is_in_it():
    assert time_range.asked(NOW - HOUR_MS, 0, NOW, MINUTE_MS) == TimeRange(NOW - HOUR_MS - 5, NOW + MINUTE_MS - 5)


def test_where_minutes_are_not_kept_any_more_hours_are():
    edge = 20_000 * DAY_MS - DAY_MS
    wanted = TimeRange(edge - MINUTE_MS, edge + MINUTE_MS)
    assert time_range.covered(wanted, KEPT, NOW) == TimeRange(edge - HOUR_MS, edge + MINUTE_MS)


def test_minutes_of_a_time_that_has_hours_only_are_refused():
    old = 19_990 * DAY_MS
    with pytest.raises(InvalidArgumentError, match="minutes of that time are not kept"):
        time_range.covered(TimeRange(old, old + MINUTE_MS), KEPT, NOW)


@pytest.mark.parametrize("years", [4, 10])
def test_years_are_too_long(years):
    with pytest.raises(InvalidArgumentError, match="a report covers at most 1100"):
        time_range.asked(NOW - years * 366 * DAY_MS, 0, NOW)


def test_the_period_before_is_of_equal_length():
    assert TimeRange(10, 15).before == TimeRange(5, 10)
