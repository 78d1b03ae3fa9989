"""`ringmesh advice`: how many workers each hour would have needed."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import grpc
from rich.console import Console
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from services.cli.commands import running
from services.cli.commands.cost import moment, money


def ask(
    address: str, worker_type: str, since: str, until: str | None, wait_ms: float
) -> ledger_pb2.AdviseWorkersResponse:
    """Raises CommandError."""
    now = time.time()
    request = ledger_pb2.AdviseWorkersRequest(
        worker_type=worker_type,
        from_ms=moment(since, now),
        until_ms=moment(until, now) if until is not None else 0,
        wait_us=round(wait_ms * 1000),
    )

    def call(channel: grpc.Channel) -> ledger_pb2.AdviseWorkersResponse:
        return ledger_pb2_grpc.LedgerServiceStub(channel).AdviseWorkers(request, timeout=running.SECONDS)

    return running.ask(address, "ledger", call)


def show(console: Console, answer: ledger_pb2.AdviseWorkersResponse) -> None:
    """A line an hour, and what it would have saved."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("hour (UTC)", no_wrap=True)
    for column in ("computed", "workers", "wait p99 ms", "replayed", "advised", "wait p99 ms", "cost", "advised"):
        table.add_column(column, justify="right", no_wrap=True)
    for hour in answer.hours:
        table.add_row(
            f"{datetime.fromtimestamp(hour.begins_ms / 1000, UTC):%Y-%m-%d %H:%M}",
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
    for warning in answer.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
