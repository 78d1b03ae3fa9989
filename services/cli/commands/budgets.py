"""`ringmesh budgets`: how much tenants and models may cost, and how much of it is spent."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import grpc
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from services.cli.commands import running
from services.cli.commands.cost import as_json, money
from services.cli.commands.prices import nano


def states(address: str) -> ledger_pb2.ListBudgetsResponse:
    """Raises CommandError."""

    def call(channel: grpc.Channel) -> ledger_pb2.ListBudgetsResponse:
        return ledger_pb2_grpc.LedgerServiceStub(channel).ListBudgets(
            ledger_pb2.ListBudgetsRequest(), timeout=running.SECONDS
        )

    return running.ask(address, "ledger", call)


def listing(found: ledger_pb2.ListBudgetsResponse) -> Table:
    """A line a budget."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("tenant", "model", "a"):
        table.add_column(column, no_wrap=True)
    for column in ("soft", "hard", "spent", "leased"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("currency", "renews", ""):
        table.add_column(column, no_wrap=True)
    for state in found.budgets:
        budget = state.budget
        table.add_row(
            budget.tenant or "all",
            budget.model or "all",
            _period(budget.period),
            money(budget.soft_nano) if budget.soft_nano else "",
            money(budget.hard_nano) if budget.hard_nano else "",
            money(state.spent_nano),
            money(state.leased_nano),
            budget.currency,
            f"{datetime.fromtimestamp(state.renews_at_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC",
            "used up" if state.hard_reached else "soft bound reached" if state.soft_reached else "",
        )
    return table


def plain(found: ledger_pb2.ListBudgetsResponse) -> str:
    """As JSON."""
    told = json.loads(as_json(found))
    for state in told["budgets"]:
        state["budget"]["period"] = _period(state["budget"]["period"])
    return json.dumps(told, indent=2)


def set_budget(address: str, tenant: str, model: str, period: str, soft: str, hard: str, currency: str) -> None:
    """Raises CommandError."""
    budget = ledger_pb2.Budget(
        tenant=tenant,
        model=model,
        period=ledger_pb2.Period.Value(f"PERIOD_{period.upper()}"),
        soft_nano=nano(soft),
        hard_nano=nano(hard),
        currency=currency,
    )

    def call(channel: grpc.Channel) -> ledger_pb2.SetBudgetResponse:
        return ledger_pb2_grpc.LedgerServiceStub(channel).SetBudget(
            ledger_pb2.SetBudgetRequest(budget=budget), timeout=running.SECONDS
        )

    running.ask(address, "ledger", call)


def delete(address: str, tenant: str, model: str, period: str) -> None:
    """Raises CommandError."""
    request = ledger_pb2.DeleteBudgetRequest(
        tenant=tenant, model=model, period=ledger_pb2.Period.Value(f"PERIOD_{period.upper()}")
    )

    def call(channel: grpc.Channel) -> ledger_pb2.DeleteBudgetResponse:
        return ledger_pb2_grpc.LedgerServiceStub(channel).DeleteBudget(request, timeout=running.SECONDS)

    running.ask(address, "ledger", call)


def _period(number: int) -> str:
    return ledger_pb2.Period.Name(ledger_pb2.Period.ValueType(number)).removeprefix("PERIOD_").lower()
