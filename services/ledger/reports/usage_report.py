"""Usage and cost by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import usage_query
from services.ledger.reports.money import apportioned, rounded
from services.ledger.reports.periods import pieces
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
    changes: bool = False
    allow_unpriced: bool = False


_NOTHING = Amounts()


@dataclass(slots=True)
class _Row:
    measures: list[int] = field(default_factory=lambda: [0] * len(MEASURES))
    amounts: Amounts = _NOTHING
    previous: Amounts = _NOTHING


async def usage_report(
    connection: Connection, book: PriceBook, currency: str, question: UsageQuestion
) -> ledger_pb2.ReportResponse:
    """Rows add up to the total exactly. Raises FailedPreconditionError where a price is missing and may not be."""
    warnings: list[str] = []
    rows: dict[tuple[str, ...], _Row] = {}
    for sums, amounts in await _rated(connection, book, question, question.range, warnings):
        row = rows.setdefault(sums.group, _Row())
        row.measures = [a + b for a, b in zip(row.measures, sums.measures, strict=True)]
        row.amounts = row.amounts.plus(amounts)
    if question.changes:
        before = question.range.before
        for sums, amounts in await _rated(connection, book, question, before, warnings):
            row = rows.setdefault(sums.group, _Row())
            row.previous = row.previous.plus(amounts)
    keys, built, total = _priced(rows, question.groups, book.denominator)
    if question.changes:
        order = sorted(built, key=lambda row: (-abs(row.cost_nano - row.previous_cost_nano), -row.requests))
    elif "day" in question.groups:
        order = [row for _, row in sorted(zip(keys, built, strict=True), key=lambda pair: (pair[1].day, pair[0]))]
    else:
        order = sorted(built, key=lambda row: (-row.cost_nano, -row.saved_nano, -row.requests))
    return ledger_pb2.ReportResponse(
        rows=order[: question.limit] if question.groups else (),
        total=total,
        from_ms=question.range.from_ms,
        until_ms=question.range.until_ms,
        currency=currency,
        row_count=len(rows) if question.groups else 0,
        warnings=warnings,
    )


async def _rated(
    connection: Connection, book: PriceBook, question: UsageQuestion, range_: TimeRange, warnings: list[str]
) -> Sequence[tuple[usage_query.Sums, Amounts]]:
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rating = Rating(book, boundaries)
    found = await usage_query.fetch(connection, pieces(boundaries), question.groups, question.filters)
    rated = [(sums, rating.amounts(sums)) for sums in found]
    warnings += rating.warnings(allow_unpriced=question.allow_unpriced)
    return rated


def _priced(
    rows: Mapping[tuple[str, ...], _Row], groups: Sequence[str], denominator: int
) -> tuple[list[tuple[str, ...]], list[ledger_pb2.ReportRow], ledger_pb2.ReportRow]:
    """Keys, their rows, and the total: each kind of money rounded once, and divided among the rows."""
    keys = list(rows)
    money: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    for name, weights in (
        ("cost_nano", [row.amounts.cost for row in rows.values()]),
        ("saved_nano", [row.amounts.saved for row in rows.values()]),
        ("error_nano", [row.amounts.error for row in rows.values()]),
        ("previous_cost_nano", [row.previous.cost for row in rows.values()]),
    ):
        totals[name] = rounded(sum(weights), denominator)
        money[name] = apportioned(weights, totals[name])
    built = []
    sums = [0] * len(MEASURES)
    for place, key in enumerate(keys):
        measures = rows[key].measures
        sums = [a + b for a, b in zip(sums, measures, strict=True)]
        built.append(_row(measures, {name: parts[place] for name, parts in money.items()}, groups, key))
    return keys, built, _row(sums, totals, (), ())


def _row(
    measures: Sequence[int], money: Mapping[str, int], groups: Sequence[str], key: Sequence[str]
) -> ledger_pb2.ReportRow:
    names: dict[str, Any] = dict(zip(groups, key, strict=True))
    numbers: dict[str, Any] = {**dict(zip(MEASURES, measures, strict=True)), **money}
    row = ledger_pb2.ReportRow(**names, **numbers)
    if row.requests:
        row.cost_per_1000_nano = rounded(row.cost_nano * 1000, row.requests)
    return row
