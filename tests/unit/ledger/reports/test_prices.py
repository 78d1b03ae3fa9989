"""Prices over time."""

import pytest

from services.ledger.reports.prices import PriceBook, placed
from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.times import HOUR_MS
from services.runtime.errors import AlreadyExistsError


def price(from_hour, until_hour=None, hourly_nano=1, **rest):
    until_ms = NO_END_MS if until_hour is None else until_hour * HOUR_MS
    return Price("cpu", from_hour * HOUR_MS, until_ms, hourly_nano, **rest)


def test_a_period_that_overlaps_is_refused_by_name():
    with pytest.raises(
        AlreadyExistsError, match=r"from 1970-01-01 02:00 UTC until 1970-01-01 05:00 UTC, which overlaps"
    ):
        placed([price(2, 5)], price(4, 6), supersede=False)


def test_periods_that_touch_do_not_overlap():
    assert placed([price(2, 5)], price(5), supersede=False) == [price(2, 5), price(5)]
    assert placed([price(2, 5)], price(0, 2), supersede=False) == [price(0, 2), price(2, 5)]


def test_to_supersede_ends_what_holds_and_replaces_what_is_within():
    existing = [price(0, 4, 1), price(4, 6, 2), price(6, None, 3)]
    assert placed(existing, price(3, 8, 9), supersede=True) == [price(0, 3, 1), price(3, 8, 9), price(8, None, 3)]


def test_a_price_may_be_set_within_another():
    assert placed([price(0, None, 1)], price(3, 4, 9), supersede=True) == [
        price(0, 3, 1),
        price(3, 4, 9),
        price(4, None, 1),
    ]


def test_rates_of_different_slots_have_one_denominator():
    one, three = price(0, 1, 3600, slots=1), price(1, None, 3600, slots=3)
    book = PriceBook([one, three], "EUR")
    assert book.rate(one) * 3_600_000_000 / book.denominator == 3600
    assert book.rate(one) == 3 * book.rate(three)


def test_boundaries_are_where_any_price_changes_within_the_range():
    book = PriceBook([price(0, 2), price(2, 5), price(5)], "EUR")
    assert book.boundaries(HOUR_MS, 5 * HOUR_MS) == [HOUR_MS, 2 * HOUR_MS, 5 * HOUR_MS]
    assert book.find("cpu", 2 * HOUR_MS) == price(2, 5)
    assert book.find("gpu", 0) is None
