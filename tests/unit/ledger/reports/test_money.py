"""Money as integers."""

from services.ledger.reports.money import rounded


def test_halves_are_rounded_up():
    assert [rounded(numerator, 2) for numerator in (0, 1, 2, 3)] == [0, 1, 1, 2]
