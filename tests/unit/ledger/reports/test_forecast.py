"""What the month will cost."""

from datetime import date, timedelta

from services.ledger.reports.forecast import forecast


def days(first, *costs):
    return {first + timedelta(days=place): cost for place, cost in enumerate(costs)}


def test_a_steady_month_ends_as_it_began():
    told = forecast(days(date(2026, 11, 1), *[100] * 14), date(2026, 11, 15), 1450, 0.5)
    assert told.expected_nano == told.low_nano == told.high_nano == 3000
    assert told.basis == "the last 14 days, by day of the week"


def test_weekends_are_expected_as_they_were():
    week = [100, 100, 100, 100, 100, 10, 10]
    # 2026-11-02 is a Monday.
    told = forecast(days(date(2026, 11, 2), *week, *week), date(2026, 11, 16), 1040, 0.0)
    assert told.expected_nano == 1040 + 2 * 520 + 100


def test_few_days_give_a_mean_and_a_wide_range():
    told = forecast(days(date(2026, 11, 1), 100, 200), date(2026, 11, 3), 300, 0.0)
    assert told.expected_nano == 300 + 28 * 150
    assert told.low_nano < told.expected_nano < told.high_nano
    assert told.basis == "the mean of the last 2 days"


def test_a_ledger_that_began_today_goes_by_today():
    told = forecast({}, date(2026, 11, 30), 500, 0.5)
    assert (told.expected_nano, told.basis) == (1000, "today alone")


def test_days_on_which_nothing_ran_count_as_nothing():
    told = forecast({date(2026, 11, 1): 100}, date(2026, 11, 11), 100, 0.0)
    assert told.expected_nano == 100 + 20 * 10


def test_nothing_less_than_what_was_spent_is_expected():
    told = forecast(days(date(2026, 11, 1), 0, 10_000, 0), date(2026, 11, 4), 10_000, 0.0)
    assert told.low_nano >= 10_000
