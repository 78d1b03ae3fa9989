"""`ringmesh advice`: what would have cost less, from replayed demand."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from ringmesh.ledger.v1 import ledger_pb2

from services.cli.commands import tables
from services.cli.commands.cost import NANO, call, money, period, warn

# Up to 200,000 requests are replayed some times.
_SECONDS = 300.0


def ask(
    address: str, since: str, until: str | None, latency_ms: float, worker_type: str, *, memory_price: float
) -> ledger_pb2.AdviseResponse:
    """Raises CommandError."""
    request = ledger_pb2.AdviseRequest(
        **period(since, until),
        latency_us=round(latency_ms * 1000),
        worker_type=worker_type,
        memory_gb_hour_nano=round(memory_price * NANO),
    )
    return call(address, lambda stub: stub.Advise(request, timeout=_SECONDS))


def show(console: Console, answer: ledger_pb2.AdviseResponse) -> None:
    """What to do, the most money first, and what it rests on."""
    for one in answer.recommendations:
        about = f"{', '.join(one.subjects)}: " if one.subjects else ""
        off = f"; the replay is off by {one.error:.0%}" if one.HasField("error") else ""
        verb, nano = ("saves", one.saved_nano) if one.saved_nano >= 0 else ("costs", -one.saved_nano)
        _print(console, f"{about}{one.advice}: {verb} {money(nano)} {answer.currency}", style="bold")
        _print(console, f"  {one.evidence}{off}")
    if answer.hours:
        numbers = ("computed", "workers", "p99 ms", "replayed", "advised", "p99 ms", "cost", "advised")
        table = tables.create("hour (UTC)", "type", *(f">{name}" for name in numbers))
        for hour in answer.hours:
            table.add_row(
                tables.utc(hour.begins_ms),
                escape(hour.worker_type),
                f"{hour.requests:,}",
                f"{hour.workers:.1f}",
                f"{hour.measured_latency_us / 1000:,.1f}",
                f"{hour.replayed_latency_us / 1000:,.1f}",
                str(hour.advised_workers),
                f"{hour.advised_latency_us / 1000:,.1f}",
                money(hour.cost_nano),
                money(hour.advised_cost_nano),
            )
        console.print(table)
    if answer.cache_sizes:
        table = tables.create(">cache MiB", ">hits", f">saved {answer.currency}", f">memory {answer.currency}")
        for size in answer.cache_sizes:
            table.add_row(
                f"{size.bytes / 2**20:,.0f}", f"{size.hit_ratio:.1%}", money(size.saved_nano), money(size.memory_nano)
            )
        console.print(table)
    warn(console, answer.warnings)


def _print(console: Console, line: str, *, style: str = "") -> None:
    console.print(line, soft_wrap=True, style=style, markup=False)
