"""`ringmesh budgets`: how much tenants and models may cost, and how much of it is spent."""

from __future__ import annotations

import json

from rich.markup import escape
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2

from services.cli.commands import tables
from services.cli.commands.cost import as_json, call, money
from services.cli.commands.prices import nano


def states(address: str) -> ledger_pb2.ListBudgetsResponse:
    """Raises CommandError."""
    return call(address, lambda stub: stub.ListBudgets(ledger_pb2.ListBudgetsRequest()))


def listing(found: ledger_pb2.ListBudgetsResponse) -> Table:
    table = tables.create(
        "tenant",
        "model",
        "period",
        ">soft",
        ">hard",
        ">spent",
        ">leased",
        "currency",
        "renews",
        "",
        widest=tables.WIDEST_NAME,
    )
    for state in found.budgets:
        budget = state.budget
        table.add_row(
            escape(budget.tenant or "all"),
            escape(budget.model or "all"),
            _period(budget.period),
            money(budget.soft_nano) if budget.soft_nano else "",
            money(budget.hard_nano) if budget.hard_nano else "",
            money(state.spent_nano),
            money(state.leased_nano),
            budget.currency,
            f"{tables.utc(state.renews_at_ms)} UTC",
            "used up" if state.hard_reached else "soft bound reached" if state.soft_reached else "",
        )
    return table


def plain(found: ledger_pb2.ListBudgetsResponse) -> str:
    budgets = json.loads(as_json(found))
    for state in budgets["budgets"]:
        state["budget"]["period"] = _period(state["budget"]["period"])
    return json.dumps(budgets, indent=2)


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
    request = ledger_pb2.SetBudgetRequest(budget=budget)
    call(address, lambda stub: stub.SetBudget(request))


def delete(address: str, tenant: str, model: str, period: str) -> None:
    """Raises CommandError."""
    request = ledger_pb2.DeleteBudgetRequest(
        tenant=tenant, model=model, period=ledger_pb2.Period.Value(f"PERIOD_{period.upper()}")
    )
    call(address, lambda stub: stub.DeleteBudget(request))


def _period(number: int) -> str:
    return ledger_pb2.Period.Name(ledger_pb2.Period.ValueType(number)).removeprefix("PERIOD_").lower()
