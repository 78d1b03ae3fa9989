"""What single requests cost: by trace, or the costliest of an hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.money import rounded
from services.ledger.reports.prices import ROUTER, PriceBook
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.times import HOUR_MS, MINUTE_MS, milliseconds
from services.runtime.errors import InvalidArgumentError

_LEAST_DIGITS, _DIGITS = 8, 32
_DETAILS = ("cache_us", "queue_us", "run_us", "batch_requests", "batch_rows", "rows")
_SELECT = (
    "SELECT u.at, u.trace_id, u.requests, u.total_us, u.router_us, u.cache_us, u.queue_us, u.run_us, u.compute_us, "
    "u.saved_us, u.request_bytes, u.response_bytes, u.batch_requests, u.batch_rows, u.rows, s.tenant, s.model, "
    "s.version, s.region, s.worker_type, k.outcome, k.status "
    "FROM usage u JOIN series s ON s.id = u.series JOIN kind k ON k.id = u.kind "
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
    for name, value in filters.items():
        arguments.append(value)
        wanted.append(f"s.{name} = ${len(arguments)}")
    return f"{_SELECT}WHERE {' AND '.join(wanted)} ORDER BY u.compute_us DESC, u.at LIMIT {limit}", arguments


async def request_report(
    connection: Connection,
    book: PriceBook,
    currency: str,
    range_: TimeRange,
    trace_id: str,
    filters: Mapping[str, str],
    limit: int,
    *,
    allow_unpriced: bool,
) -> ledger_pb2.ReportResponse:
    """A row a record, the costliest first; the total is that of the rows shown."""
    sql, arguments = statement(range_, trace_id, filters, limit)
    boundaries = book.boundaries(range_.from_ms, range_.until_ms)
    rating = Rating(book, boundaries)
    total = ledger_pb2.ReportRow()
    rows = []
    for found in await connection.fetch(sql, *arguments):
        row = _row(found, rating, boundaries, book.denominator)
        rows.append(row)
        for name in (
            "requests",
            "hits",
            "errors",
            "compute_us",
            "saved_us",
            "error_us",
            "router_us",
            "total_us",
            "request_bytes",
            "response_bytes",
            "cost_nano",
            "saved_nano",
            "error_nano",
        ):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    return ledger_pb2.ReportResponse(
        rows=rows,
        total=total,
        from_ms=range_.from_ms,
        until_ms=range_.until_ms,
        currency=currency,
        row_count=len(rows),
        warnings=rating.warnings(allow_unpriced=allow_unpriced),
    )


def _row(found: Mapping[str, Any], rating: Rating, boundaries: list[int], denominator: int) -> ledger_pb2.ReportRow:
    at_ms = milliseconds(found["at"])
    segment = max(place for place, begin in enumerate(boundaries[:-1]) if begin <= at_ms)
    worker_type, compute, saved = found["worker_type"], found["compute_us"], found["saved_us"]
    is_error = found["status"] != "OK"
    cost = rating.rated(worker_type, segment, compute)
    is_hit = not is_error and (found["outcome"].startswith("hit-") or found["outcome"] == "joined")
    return ledger_pb2.ReportRow(
        tenant=found["tenant"],
        model=found["model"],
        version=found["version"],
        region=found["region"],
        requests=found["requests"],
        hits=found["requests"] * is_hit,
        errors=found["requests"] * is_error,
        compute_us=compute,
        saved_us=saved,
        error_us=compute * is_error,
        router_us=found["router_us"],
        total_us=found["total_us"],
        request_bytes=found["request_bytes"],
        response_bytes=found["response_bytes"],
        cost_nano=rounded(cost + rating.rated(ROUTER, segment, found["router_us"]), denominator),
        saved_nano=rounded(rating.rated(worker_type, segment, saved), denominator),
        error_nano=rounded(cost * is_error, denominator),
        request=ledger_pb2.RequestDetail(
            trace_id=found["trace_id"].hex,
            at_ms=at_ms,
            outcome=found["outcome"],
            status=found["status"],
            worker_type=worker_type,
            **{name: found[name] for name in _DETAILS},
        ),
    )
