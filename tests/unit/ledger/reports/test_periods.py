"""Ranges as cells of roll-ups."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.periods import Piece, pieces
from services.ledger.storage.rollups import GRAINS

MINUTE, HOUR, DAY, WEEK = GRAINS.values()


def test_days_in_the_middle_hours_and_minutes_at_the_ends():
    begin, end = DAY - HOUR - 2 * MINUTE, 3 * DAY + HOUR + MINUTE
    assert pieces([begin, end]) == [
        Piece(0, "minute", begin, DAY - HOUR),
        Piece(0, "hour", DAY - HOUR, DAY),
        Piece(0, "day", DAY, 3 * DAY),
        Piece(0, "hour", 3 * DAY, 3 * DAY + HOUR),
        Piece(0, "minute", 3 * DAY + HOUR, end),
    ]


def test_weeks_in_the_middle_where_there_are_any():
    begin, end = 6 * DAY, 3 * WEEK + DAY
    assert pieces([begin, end], 4 * WEEK) == [
        Piece(0, "day", begin, WEEK),
        Piece(0, "week", WEEK, 3 * WEEK),
        Piece(0, "day", 3 * WEEK, end),
    ]
    assert pieces([begin, end]) == [Piece(0, "day", begin, end)]


def test_weeks_only_as_far_as_they_are_summed():
    assert pieces([0, 4 * WEEK], 2 * WEEK) == [
        Piece(0, "week", 0, 2 * WEEK),
        Piece(0, "day", 2 * WEEK, 4 * WEEK),
    ]


def test_a_range_within_an_hour_is_of_minutes():
    assert pieces([HOUR + MINUTE, HOUR + 5 * MINUTE]) == [Piece(0, "minute", HOUR + MINUTE, HOUR + 5 * MINUTE)]


@given(st.lists(st.integers(0, 50_000), min_size=2, max_size=4, unique=True).map(sorted), st.integers(0, 6))
def test_pieces_cover_each_minute_once_in_its_segment(minutes, weeks):
    boundaries = [minute * MINUTE for minute in minutes]
    found = sorted(pieces(boundaries, weeks * WEEK), key=lambda piece: piece.from_ms)
    assert found[0].from_ms == boundaries[0]
    assert found[-1].until_ms == boundaries[-1]
    for before, after in pairwise(found):
        assert before.until_ms == after.from_ms
    for piece in found:
        assert piece.grain != "week" or piece.until_ms <= weeks * WEEK
        assert piece.from_ms % GRAINS[piece.grain] == piece.until_ms % GRAINS[piece.grain] == 0
        assert boundaries[piece.segment] <= piece.from_ms < piece.until_ms <= boundaries[piece.segment + 1]
