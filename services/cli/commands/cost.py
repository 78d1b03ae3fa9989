"""`ringmesh cost`: what requests used, what that cost, and what the cache saved, as the ledger says."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from services.cli.commands import running, tables
from services.cli.commands.cost_groups import By
from services.cli.errors import CommandError

NANO = 10**9
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EXPORT_SECONDS = 3600.0


def moment(text: str | None, now: float) -> int:
    """Milliseconds since the Unix epoch of an age, such as 90m, 24h or 7d, or of an ISO time; 0 for None.

    Raises CommandError.
    """
    if text is None:
        return 0
    if age := re.fullmatch(r"(\d{1,9})([smhdw])", text):
        return max(int((now - int(age[1]) * _UNITS[age[2]]) * 1000), 0)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(
            f"{text!r} is neither an age, such as 90m, 24h or 7d, nor a time, such as 2026-11-29"
        ) from None
    milliseconds = int((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp() * 1000)
    if milliseconds < 0:
        raise CommandError(f"{text!r} is before 1970-01-01")
    return milliseconds


def period(since: str | None, until: str | None) -> dict[str, Any]:
    """The fields `from_ms` and `until_ms` of a request, as `moment`. Raises CommandError."""
    now = time.time()
    return {"from_ms": moment(since, now), "until_ms": moment(until, now)}


def call(address: str, ask: Callable[[ledger_pb2_grpc.LedgerServiceStub], running.Answer]) -> running.Answer:
    """Calls the ledger at `address`. Raises CommandError."""
    return running.ask(address, "ledger", lambda channel: ask(ledger_pb2_grpc.LedgerServiceStub(channel)))


def report(
    address: str,
    by: Sequence[By],
    since: str | None,
    until: str | None,
    filters: Mapping[str, str | None],
    trace: str,
    *,
    limit: int,
    changes: bool,
    allow_unpriced: bool,
) -> ledger_pb2.ReportResponse:
    """Raises CommandError."""
    given = {name: value for name, value in filters.items() if value is not None}
    request = ledger_pb2.ReportRequest(
        by=[ledger_pb2.Group.Value(f"GROUP_{one.name}") for one in by],
        trace_id=trace,
        limit=limit,
        changes=changes,
        allow_unpriced=allow_unpriced,
        **period("1h" if since is None and not trace else since, until) | given,
    )
    return call(address, lambda stub: stub.Report(request))


def bill(address: str, since: str | None, until: str | None, *, allow_unpriced: bool) -> ledger_pb2.BillResponse:
    """Raises CommandError."""
    request = ledger_pb2.BillRequest(**period("1h" if since is None else since, until), allow_unpriced=allow_unpriced)
    return call(address, lambda stub: stub.Bill(request))


def forecast(address: str) -> ledger_pb2.ForecastResponse:
    """Raises CommandError."""
    return call(address, lambda stub: stub.Forecast(ledger_pb2.ForecastRequest()))


def export(address: str, begin: str, until: str | None, path: Path) -> int:
    """Writes the records to a file, CSV or Parquet by its ending; its bytes. Raises CommandError."""
    formats = {".csv": ledger_pb2.ExportRequest.FORMAT_CSV, ".parquet": ledger_pb2.ExportRequest.FORMAT_PARQUET}
    if path.suffix not in formats:
        raise CommandError(f"{path}: name a file that ends with .csv or .parquet")
    request = ledger_pb2.ExportRequest(**period(begin, until), format=formats[path.suffix])
    # Written aside: a file of that name is whole.
    aside = path.with_name(f".{path.name}.partial")

    def fetch(stub: ledger_pb2_grpc.LedgerServiceStub) -> int:
        written = 0
        with aside.open("wb") as file:
            for answer in stub.Export(request, timeout=_EXPORT_SECONDS):
                written += file.write(answer.part)
        return written

    try:
        written = call(address, fetch)
        aside.replace(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return written


def as_json(answer: Message, names: Sequence[By] = ()) -> str:
    """The answer, numbers as numbers and all fields of a row there, zero or not; of labels those of `names`."""
    return json.dumps(_plain(answer, {str(name) for name in names}), indent=2)


def _plain(message: Message, names: set[str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if (
            isinstance(message, ledger_pb2.ReportRow)
            and field.type == field.TYPE_STRING
            and not (value or field.name in names)
        ):
            continue
        if field.message_type is None:
            plain[field.name] = list(value) if field.is_repeated else value
        elif field.is_repeated:
            plain[field.name] = [_plain(one, names) for one in value]
        elif message.HasField(field.name):
            plain[field.name] = _plain(value, names)
    return plain


def show_report(console: Console, answer: ledger_pb2.ReportResponse, by: Sequence[By], *, changes: bool) -> None:
    currency = answer.currency
    is_single = By.REQUEST in by or any(row.HasField("request") for row in answer.rows)
    columns = _single_columns(currency) if is_single else _group_columns(by, currency, changes=changes)
    table = tables.create(
        *(f"{'>' if is_number else ''}{name}" for name, is_number, _ in columns), widest=tables.WIDEST_NAME
    )
    for row in answer.rows:
        table.add_row(*(escape(value(row)) for _, _, value in columns))
    labels = sum(not is_number for _, is_number, _ in columns)
    total = [value(answer.total) for _, is_number, value in columns if is_number]
    table.add_row(*(["total", *[""] * (labels - 1)] if labels else []), *total, style="bold")
    console.print(f"{tables.utc(answer.from_ms)} UTC to {tables.utc(answer.until_ms)} UTC")
    console.print(table)
    if answer.row_count > len(answer.rows):
        console.print(f"the first {len(answer.rows)} of {answer.row_count} rows")
    warn(console, answer.warnings)


def show_bill(console: Console, answer: ledger_pb2.BillResponse) -> None:
    amounts = (f">{name} {answer.currency}" for name in ("requests", "idle", "bill"))
    table = tables.create("worker type", "region", ">paid s", ">used s", ">idle s", *amounts)
    rows = [(row, row.worker_type, row.region, "") for row in answer.rows]
    for row, worker_type, region, style in (*rows, (answer.total, "total", "", "bold")):
        times = (_seconds(us) for us in (row.paid_us, row.used_us, row.idle_us))
        costs = (money(nano) for nano in (row.requests_nano, row.idle_nano, row.bill_nano))
        table.add_row(escape(worker_type), escape(region), *times, *costs, style=style)
    console.print(f"{tables.utc(answer.from_ms)} UTC to {tables.utc(answer.until_ms)} UTC")
    console.print(table)
    warn(console, answer.warnings)


def show_forecast(console: Console, answer: ledger_pb2.ForecastResponse) -> None:
    currency = answer.currency
    console.print(
        f"{answer.month}: {money(answer.spent_nano)} {currency} so far, {money(answer.expected_nano)} {currency} "
        f"expected ({money(answer.low_nano)} to {money(answer.high_nano)}), from {answer.basis}; "
        f"the cache saved {money(answer.saved_nano)} {currency}",
        soft_wrap=True,
    )
    warn(console, answer.warnings)


_Column = tuple[str, bool, Callable[[ledger_pb2.ReportRow], str]]


def _group_columns(by: Sequence[By], currency: str, *, changes: bool) -> list[_Column]:
    columns: list[_Column] = [(str(one), False, partial(_label, str(one))) for one in by]
    columns += [
        ("requests", True, lambda row: f"{row.requests:,}"),
        ("hits", True, lambda row: f"{row.hits / row.requests:.0%}" if row.requests else ""),
        ("errors", True, lambda row: f"{row.errors:,}"),
        ("compute s", True, lambda row: _seconds(row.compute_us)),
        ("saved s", True, lambda row: _seconds(row.saved_us)),
        (f"cost {currency}", True, lambda row: money(row.cost_nano)),
        (f"saved {currency}", True, lambda row: money(row.saved_nano)),
        (f"errors {currency}", True, lambda row: money(row.error_nano)),
        (f"1,000 requests {currency}", True, lambda row: money(row.cost_per_1000_nano)),
    ]
    if changes:
        columns += [
            (f"before {currency}", True, lambda row: money(row.previous_cost_nano)),
            (f"change {currency}", True, lambda row: money(row.cost_nano - row.previous_cost_nano)),
        ]
    return columns


def _single_columns(currency: str) -> list[_Column]:
    return [
        ("time", False, lambda row: f"{tables.utc(row.request.at_ms)} UTC" if row.HasField("request") else ""),
        ("trace", False, lambda row: row.request.trace_id[:12] or "folded"),
        ("tenant", False, lambda row: row.tenant or "-"),
        ("model", False, lambda row: f"{row.model}/{row.version}"),
        ("outcome", False, lambda row: row.request.outcome),
        ("status", False, lambda row: row.request.status),
        ("requests", True, lambda row: f"{row.requests:,}"),
        ("total ms", True, lambda row: f"{row.total_us / 1000:,.1f}"),
        ("compute ms", True, lambda row: f"{row.compute_us / 1000:,.1f}"),
        ("saved ms", True, lambda row: f"{row.saved_us / 1000:,.1f}"),
        (f"cost {currency}", True, lambda row: money(row.cost_nano)),
        (f"saved {currency}", True, lambda row: money(row.saved_nano)),
    ]


def _label(name: str, row: ledger_pb2.ReportRow) -> str:
    return getattr(row, name) or "-"


def warn(console: Console, warnings: Sequence[str]) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def money(nano: int) -> str:
    """As much as tells amounts apart: cents for hundreds, all nine digits for fractions of a cent."""
    digits = 2 if abs(nano) >= 100 * NANO else 4 if abs(nano) >= NANO else 9
    sign, nano = ("-" if nano < 0 else ""), abs(nano)
    unit = 10 ** (9 - digits)
    whole, part = divmod((nano + unit // 2) // unit, 10**digits)
    return f"{sign}{whole:,}.{part:0{digits}d}"


def _seconds(us: int) -> str:
    return f"{us / 1e6:,.1f}"
