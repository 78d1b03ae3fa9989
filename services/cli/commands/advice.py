"""`ringmesh advice`: how many workers each hour would have needed."""

from __future__ import annotations

import time

from rich.console import Console
from ringmesh.ledger.v1 import ledger_pb2

from services.cli.commands import tables
from services.cli.commands.cost import call, moment, money, warn


def ask(
    address: str, worker_type: str, since: str, until: str | None, wait_ms: float
) -> ledger_pb2.AdviseWorkersResponse:
    """Raises CommandError."""
    now = time.time()
    request = ledger_pb2.AdviseWorkersRequest(
        worker_type=worker_type,
        from_ms=moment(since, now),
        until_ms=moment(until, now),
        wait_us=round(wait_ms * 1000),
    )
    return call(address, lambda stub: stub.AdviseWorkers(request))


def show(console: Console, answer: ledger_pb2.AdviseWorkersResponse) -> None:
    """A line an hour, and what it would have saved."""
    numbers = ("computed", "workers", "wait p99 ms", "replayed", "advised", "wait p99 ms", "cost", "advised")
    table = tables.create("hour (UTC)", *(f">{name}" for name in numbers))
    for hour in answer.hours:
        table.add_row(
            tables.utc(hour.begins_ms),
            f"{hour.requests:,}",
            f"{hour.workers:.1f}",
            f"{hour.measured_wait_us / 1000:,.1f}",
            f"{hour.replayed_wait_us / 1000:,.1f}",
            str(hour.advised_workers),
            f"{hour.advised_wait_us / 1000:,.1f}",
            money(hour.cost_nano),
            money(hour.advised_cost_nano),
        )
    console.print(table)
    console.print(
        f"with waits of at most {answer.wait_us / 1000:g} ms for 99 in 100 requests: {money(answer.advised_cost_nano)} "
        f"{answer.currency} instead of {money(answer.cost_nano)}. The replay of the workers that there were is off by "
        f"{answer.error_us / 1000:,.1f} ms (median of the hours).",
        highlight=False,
        soft_wrap=True,
    )
    warn(console, answer.warnings)
