"""What single requests cost: by trace, or the costliest of an hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.prices import ROUTER, PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.usage_report import UsageQuestion
from services.ledger.storage.database import Connection
from services.ledger.storage.kinds import UsageKind
from services.ledger.storage.rollups import MEASURES
from services.ledger.storage.times import HOUR_MS, MINUTE_MS, milliseconds
from services.runtime.errors import InvalidArgumentError

_LEAST_DIGITS, _DIGITS = 8, 32
# Columns that become fields of the row, and of its details.
_COPIED = (
    "tenant",
    "model",
    "version",
    "region",
    *(name for name in MEASURES if name not in ("hits", "errors", "error_us")),
)
_DETAILS = (
    *("outcome", "status", "worker_type"),
    *("cache_us", "queue_us", "run_us", "batch_requests", "batch_rows", "rows"),
)
# Names are looked up of what is shown alone.
_ORDER = "ORDER BY u.compute_us DESC, u.at"
_SELECT = (
    f"SELECT at, trace_id, {', '.join((*_COPIED, *_DETAILS))} "
    "FROM (SELECT * FROM usage u WHERE {wanted} {order} LIMIT {limit}) u "
    "JOIN series s ON s.id = u.series JOIN kind k ON k.id = u.kind {order}"
)


def statement(range_: TimeRange, trace_id: str, filters: Mapping[str, str], limit: int) -> tuple[str, list[Any]]:
    """The query and its arguments. Raises InvalidArgumentError."""
    arguments: list[Any] = [*range_.times]
    wanted = ["u.at >= $1", "u.at < $2"]
    if trace_id:
        try:
            if not _LEAST_DIGITS <= len(trace_id) <= _DIGITS:
                raise ValueError
            arguments += (UUID(trace_id.ljust(_DIGITS, digit)) for digit in "0f")
        except ValueError:
            raise InvalidArgumentError(
                f"{trace_id!r} is no trace id: {_LEAST_DIGITS} to {_DIGITS} hexadecimal digits", field="trace_id"
            ) from None
        # The first condition is the index's own: folded hits have no trace.
        wanted += ("u.trace_id <> '00000000-0000-0000-0000-000000000000'", "u.trace_id BETWEEN $3 AND $4")
    elif range_.until_ms - range_.from_ms > HOUR_MS + MINUTE_MS:
        raise InvalidArgumentError(
            "single requests are listed for at most an hour; name a trace id, or ask for a shorter range", field="by"
        )
    if filters:
        first = len(arguments) + 1
        arguments += filters.values()
        of_series = " AND ".join(f"{name} = ${number}" for number, name in enumerate(filters, first))
        wanted.append(f"u.series IN (SELECT id FROM series WHERE {of_series})")
    return _SELECT.format(wanted=" AND ".join(wanted), order=_ORDER, limit=limit), arguments


async def request_report(
    connection: Connection, book: PriceBook, question: UsageQuestion, trace_id: str
) -> ledger_pb2.ReportResponse:
    """A row a record, the costliest first; the total is that of the rows shown."""
    range_ = question.range
    sql, arguments = statement(range_, trace_id, question.filters, question.limit)
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rating = Rating(book, boundaries)
    total = ledger_pb2.ReportRow()
    rows = []
    for found in await connection.fetch(sql, *arguments):
        row = _row(found, rating, boundaries)
        rows.append(row)
        for name in (*MEASURES, "cost_nano", "saved_nano", "error_nano"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    return ledger_pb2.ReportResponse(
        rows=rows,
        total=total,
        from_ms=range_.from_ms,
        until_ms=range_.until_ms,
        currency=book.currency,
        row_count=len(rows),
        warnings=rating.warnings(allow_unpriced=question.allow_unpriced),
    )


def _row(found: Mapping[str, Any], rating: Rating, boundaries: list[int]) -> ledger_pb2.ReportRow:
    at_ms = milliseconds(found["at"])
    segment = max(place for place, begin in enumerate(boundaries[:-1]) if begin <= at_ms)
    worker_type = found["worker_type"]
    kind = UsageKind(found["outcome"], found["status"])
    cost = rating.rated(worker_type, segment, found["compute_us"])
    return ledger_pb2.ReportRow(
        **{name: found[name] for name in _COPIED},
        hits=found["requests"] * kind.is_hit,
        errors=found["requests"] * kind.is_error,
        error_us=found["compute_us"] * kind.is_error,
        cost_nano=rating.nano(cost + rating.rated(ROUTER, segment, found["router_us"])),
        saved_nano=rating.nano(rating.rated(worker_type, segment, found["saved_us"])),
        error_nano=rating.nano(cost * kind.is_error),
        request=ledger_pb2.RequestDetail(
            trace_id=found["trace_id"].hex, at_ms=at_ms, **{name: found[name] for name in _DETAILS}
        ),
    )
