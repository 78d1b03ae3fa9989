"""Usage and cost by group.

Reports may have 100,000 rows: they are kept as columns, of which Python's loops are short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.money import rounded
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.rollups import MEASURES
from services.runtime.apportioned import apportioned


@dataclass(frozen=True, slots=True)
class UsageQuestion:
    """What a report is about. `groups` of "tenant", "model", "version", "region" and "day"; `limit` of rows."""

    range: TimeRange
    groups: tuple[str, ...]
    filters: Mapping[str, str]
    limit: int
    # What to compare with; then the largest changes come first.
    before: TimeRange | None = None
    allow_unpriced: bool = False


Group = tuple[str, ...]
Column = Sequence[int]

_REQUESTS = MEASURES.index("requests")
# Rows that are worth a thread: the loop has batches to acknowledge.
_MANY: Final = 1000


class _Money(NamedTuple):
    """Columns of a report, in nano-units."""

    cost_nano: Column
    saved_nano: Column
    error_nano: Column
    previous_cost_nano: Column


class _Found(NamedTuple):
    """Rows of a range as the database has them, and what rates them."""

    rows: Sequence[Any]
    rating: Rating


async def usage_report(connection: Connection, book: PriceBook, question: UsageQuestion) -> ledger_pb2.ReportResponse:
    """Rows add up to the total exactly. Raises FailedPreconditionError where a price is missing and may not be,
    InvalidArgumentError where there are too many rows."""
    now = await _fetch(connection, book, question, question.range)
    before = await _fetch(connection, book, question, question.before) if question.before is not None else None
    if len(now.rows) + (len(before.rows) if before is not None else 0) > _MANY:
        return await asyncio.to_thread(_report, book, question, now, before)
    return _report(book, question, now, before)


async def _fetch(connection: Connection, book: PriceBook, question: UsageQuestion, range_: TimeRange) -> _Found:
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rows = await usage_query.rows(connection, boundaries, question.groups, question.filters)
    return _Found(rows, Rating(book, boundaries))


def _report(book: PriceBook, question: UsageQuestion, now: _Found, before: _Found | None) -> ledger_pb2.ReportResponse:
    # Rows of one group may be of several prices, and are one row of the report.
    places: dict[Group, int] = {}
    found = _columns(places, question, now)
    previous = _columns(places, question, before) if before is not None else None
    keys = list(places)
    measures = [_merged(places, found, column) for column in found.measures]
    nothing = [0] * len(keys)
    numerators = (
        *(_merged(places, found, column) for column in found.numerators),
        _merged(places, previous, previous.numerators[0]) if previous is not None else nothing,
    )
    totals = [rounded(sum(column), book.denominator) for column in numerators]
    money = _Money(*map(apportioned, numerators, totals))
    shown = _order(keys, measures, money, question) if question.groups else []
    warnings = [
        warning
        for one in (now, before)
        if one is not None
        for warning in one.rating.warnings(allow_unpriced=question.allow_unpriced)
    ]
    numbers = (*MEASURES, *_Money._fields)
    fields = (*question.groups, *numbers)
    columns = (*measures, *money)
    return ledger_pb2.ReportResponse(
        rows=[_message(fields, (*keys[place], *(column[place] for column in columns))) for place in shown],
        total=_message(numbers, (*map(sum, measures), *totals)),
        from_ms=question.range.from_ms,
        until_ms=question.range.until_ms,
        currency=book.currency,
        row_count=len(keys) if question.groups else 0,
        warnings=warnings,
    )


class _Columns(NamedTuple):
    """Of the rows found: where each goes, MEASURES, and numerators of cost, savings and errors.

    `is_in_place`: each is where it goes.
    """

    places: Sequence[int]
    is_in_place: bool
    measures: Sequence[Column]
    numerators: Sequence[Column]


def _columns(places: dict[Group, int], question: UsageQuestion, found: _Found) -> _Columns:
    """Gives each new group a place."""
    width = len(question.groups)
    columns: list[Sequence[Any]] = list(zip(*found.rows, strict=True)) or [()] * (width + 2 + len(MEASURES))
    labels = [
        _labels(column) if name == "day" else column
        for name, column in zip(question.groups, columns[:width], strict=True)
    ]
    groups: Sequence[Group] = list(zip(*labels, strict=True)) if width else [()] * len(found.rows)
    measures = columns[width + 2 :]
    own = [places.setdefault(group, len(places)) for group in groups]
    return _Columns(
        own,
        own == [*range(len(own))],
        measures,
        found.rating.columns(columns[width], columns[width + 1], measures),
    )


def _labels(midnights: Sequence[Any]) -> list[str]:
    known = {midnight: usage_query.label(midnight) for midnight in {*midnights}}
    return [known[midnight] for midnight in midnights]


def _merged(places: Mapping[Group, int], found: _Columns, column: Column) -> Column:
    """The sums by place."""
    if found.is_in_place and len(places) == len(found.places):
        return column
    sums = [0] * len(places)
    for place, value in zip(found.places, column, strict=True):
        sums[place] += value
    return sums


def _order(keys: Sequence[Group], measures: Sequence[Column], money: _Money, question: UsageQuestion) -> Sequence[int]:
    """Places of the rows that are shown, in order: by day the last ones, else the first."""
    if question.before is not None:
        changes = [-abs(now - then) for now, then in zip(money.cost_nano, money.previous_cost_nano, strict=True)]
        ranks = list(zip(changes, _down(measures[_REQUESTS]), keys, strict=True))
    else:
        days = [""] * len(keys)
        if "day" in question.groups:
            days = [key[question.groups.index("day")] for key in keys]
        columns = map(_down, (money.cost_nano, money.saved_nano, measures[_REQUESTS]))
        ranks = list(zip(days, *columns, keys, strict=True))
    places = sorted(range(len(keys)), key=ranks.__getitem__)
    if "day" in question.groups and question.before is None:
        return places[-question.limit :]
    return places[: question.limit]


def _down(column: Column) -> list[int]:
    """For the largest to come first."""
    return [-value for value in column]


def _message(fields: Sequence[str], values: Sequence[Any]) -> ledger_pb2.ReportRow:
    row = ledger_pb2.ReportRow(**dict(zip(fields, values, strict=True)))
    if row.requests:
        row.cost_per_1000_nano = rounded(row.cost_nano * 1000, row.requests)
    return row
