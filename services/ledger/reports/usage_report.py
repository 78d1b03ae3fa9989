"""Usage and cost by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.money import rounded
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Amounts, Rating
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


_NOTHING = Amounts()
_REQUESTS = MEASURES.index("requests")


class _Money(NamedTuple):
    """Fields of a row, in nano-units."""

    cost_nano: int
    saved_nano: int
    error_nano: int
    previous_cost_nano: int


_MONEY = _Money._fields


@dataclass(slots=True)
class _Row:
    measures: tuple[int, ...] = (0,) * len(MEASURES)
    amounts: Amounts = _NOTHING
    previous: Amounts = _NOTHING


async def usage_report(connection: Connection, book: PriceBook, question: UsageQuestion) -> ledger_pb2.ReportResponse:
    """Rows add up to the total exactly. Raises FailedPreconditionError where a price is missing and may not be."""
    warnings: list[str] = []
    rows: dict[tuple[str, ...], _Row] = {}
    for sums, amounts in await _rated(connection, book, question, question.range, warnings):
        if (row := rows.get(sums.group)) is None:
            rows[sums.group] = _Row(sums.measures, amounts)
        else:
            row.measures = tuple(map(add, row.measures, sums.measures))
            row.amounts = row.amounts.plus(amounts)
    if question.before is not None:
        for sums, amounts in await _rated(connection, book, question, question.before, warnings):
            row = rows.setdefault(sums.group, _Row())
            row.previous = row.previous.plus(amounts)
    all_rows = list(rows.values())
    money, total = _money(all_rows, book.denominator)
    shown = _order(list(rows), all_rows, money, question)[: question.limit] if question.groups else []
    keys = list(rows)
    measures = [sum(column) for column in zip(*(row.measures for row in all_rows), strict=True)] or [0] * len(MEASURES)
    fields = (*question.groups, *MEASURES, *_MONEY)
    return ledger_pb2.ReportResponse(
        rows=[_message(fields, (*keys[place], *all_rows[place].measures, *money[place])) for place in shown],
        total=_message((*MEASURES, *_MONEY), (*measures, *total)),
        from_ms=question.range.from_ms,
        until_ms=question.range.until_ms,
        currency=book.currency,
        row_count=len(rows) if question.groups else 0,
        warnings=warnings,
    )


async def _rated(
    connection: Connection, book: PriceBook, question: UsageQuestion, range_: TimeRange, warnings: list[str]
) -> Sequence[tuple[usage_query.Sums, Amounts]]:
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rating = Rating(book, boundaries)
    found = await usage_query.fetch(connection, boundaries, question.groups, question.filters)
    rated = [(sums, rating.amounts(sums)) for sums in found]
    warnings += rating.warnings(allow_unpriced=question.allow_unpriced)
    return rated


def _money(rows: Sequence[_Row], denominator: int) -> tuple[list[_Money], _Money]:
    """Of each row, and in total: each kind rounded once, and divided among the rows."""
    columns = (
        [row.amounts.cost for row in rows],
        [row.amounts.saved for row in rows],
        [row.amounts.error for row in rows],
        [row.previous.cost for row in rows],
    )
    total = _Money(*(rounded(sum(weights), denominator) for weights in columns))
    parts = map(apportioned, columns, total)
    return list(map(_Money, *parts)), total


def _order(
    keys: Sequence[tuple[str, ...]], rows: Sequence[_Row], money: Sequence[_Money], question: UsageQuestion
) -> list[int]:
    """Places of the rows as they are shown."""

    def rank(place: int) -> tuple[str | int, ...]:
        key, requests = keys[place], rows[place].measures[_REQUESTS]
        cost, saved, _, previous = money[place]
        if question.before is not None:
            return -abs(cost - previous), -requests, *key
        if "day" in question.groups:
            return key[question.groups.index("day")], -cost, *key
        return -cost, -saved, -requests, *key

    return sorted(range(len(rows)), key=rank)


def _message(fields: Sequence[str], values: Sequence[Any]) -> ledger_pb2.ReportRow:
    row = ledger_pb2.ReportRow(**dict(zip(fields, values, strict=True)))
    if row.requests:
        row.cost_per_1000_nano = rounded(row.cost_nano * 1000, row.requests)
    return row
