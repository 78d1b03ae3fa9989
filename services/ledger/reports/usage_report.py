"""Usage and cost by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.money import apportioned, rounded
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.rating import Amounts, Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.rollups import MEASURES


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


@dataclass(slots=True)
class _Row:
    measures: list[int] = field(default_factory=lambda: [0] * len(MEASURES))
    amounts: Amounts = _NOTHING
    previous: Amounts = _NOTHING


async def usage_report(connection: Connection, book: PriceBook, question: UsageQuestion) -> ledger_pb2.ReportResponse:
    """Rows add up to the total exactly. Raises FailedPreconditionError where a price is missing and may not be."""
    warnings: list[str] = []
    rows: dict[tuple[str, ...], _Row] = {}
    for sums, amounts in await _rated(connection, book, question, question.range, warnings):
        row = rows.setdefault(sums.group, _Row())
        row.measures = [a + b for a, b in zip(row.measures, sums.measures, strict=True)]
        row.amounts = row.amounts.plus(amounts)
    if question.before is not None:
        for sums, amounts in await _rated(connection, book, question, question.before, warnings):
            row = rows.setdefault(sums.group, _Row())
            row.previous = row.previous.plus(amounts)
    money, totals = _money(list(rows.values()), book.denominator)
    shown = _order(list(rows.items()), money, question)[: question.limit] if question.groups else []
    keys, all_rows = list(rows), list(rows.values())
    measures = [sum(column) for column in zip(*(row.measures for row in all_rows), strict=True)] or [0] * len(MEASURES)
    return ledger_pb2.ReportResponse(
        rows=[
            _row(
                all_rows[place].measures,
                {name: parts[place] for name, parts in money.items()},
                question.groups,
                keys[place],
            )
            for place in shown
        ],
        total=_row(measures, totals, (), ()),
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


def _money(rows: Sequence[_Row], denominator: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Of each row, and in total: each kind rounded once, and divided among the rows."""
    money: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    for name, weights in (
        ("cost_nano", [row.amounts.cost for row in rows]),
        ("saved_nano", [row.amounts.saved for row in rows]),
        ("error_nano", [row.amounts.error for row in rows]),
        ("previous_cost_nano", [row.previous.cost for row in rows]),
    ):
        totals[name] = rounded(sum(weights), denominator)
        money[name] = apportioned(weights, totals[name])
    return money, totals


def _order(
    rows: Sequence[tuple[tuple[str, ...], _Row]], money: Mapping[str, Sequence[int]], question: UsageQuestion
) -> list[int]:
    """Places of the rows as they are shown."""
    cost, saved, previous = money["cost_nano"], money["saved_nano"], money["previous_cost_nano"]

    def rank(place: int) -> tuple[str | int, ...]:
        key, row = rows[place]
        if question.before is not None:
            return -abs(cost[place] - previous[place]), -row.measures[_REQUESTS], *key
        if "day" in question.groups:
            return key[question.groups.index("day")], -cost[place], *key
        return -cost[place], -saved[place], -row.measures[_REQUESTS], *key

    return sorted(range(len(rows)), key=rank)


def _row(
    measures: Sequence[int], money: Mapping[str, int], groups: Sequence[str], key: Sequence[str]
) -> ledger_pb2.ReportRow:
    names: dict[str, Any] = dict(zip(groups, key, strict=True))
    numbers: dict[str, Any] = {**dict(zip(MEASURES, measures, strict=True)), **money}
    row = ledger_pb2.ReportRow(**names, **numbers)
    if row.requests:
        row.cost_per_1000_nano = rounded(row.cost_nano * 1000, row.requests)
    return row
