"""Tables and lists of commands, in narrow terminals and with long names."""

import io
import json

from rich.console import Console
from ringmesh.audit.v1 import audit_pb2
from ringmesh.ledger.v1 import ledger_pb2

from services.cli.commands import advice, audit, budgets, cost
from services.cli.commands.cost_groups import By


def console(width):
    return Console(width=width, file=io.StringIO())


def test_an_entry_of_the_audit_log_is_one_whole_line_in_a_narrow_terminal():
    entry = audit_pb2.Entry(
        at_ms=1_796_038_806_936,
        process="router",
        who="key ops-1",
        method="inference.GRPCInferenceService/RepositoryModelLoad",
        request=json.dumps({"model_name": "m" * 100}),
        peer="ipv4:10.0.0.7:53122",
        result="OK",
    )
    refused = audit_pb2.Entry(at_ms=0, who="unknown", method="s/Purge", error="[red]no", result="UNAUTHENTICATED")
    narrow = console(40)
    narrow.print(audit.listing([entry, refused]), soft_wrap=True)
    head, first, second = narrow.file.getvalue().splitlines()
    assert head.split() == ["time", "process", "who", "from", "result", "method", "about"]
    for text in (
        "11:40:06.936Z",
        "router",
        "key ops-1",
        "ipv4:10.0.0.7:53122",
        "OK",
        "RepositoryModelLoad",
        entry.request,
    ):
        assert text in first
    assert second.split() == ["1970-01-01T00:00:00.000Z", "unknown", "UNAUTHENTICATED", "Purge", "[red]no"]


def test_a_period_has_a_beginning_and_an_end():
    assert cost.period("1970-01-01", "1970-01-02") == {"from_ms": 0, "until_ms": 86_400_000}


def test_a_tenant_with_a_long_name_leaves_room_for_the_amounts():
    rows = [ledger_pb2.ReportRow(tenant=name, requests=7, cost_nano=123) for name in ("t" * 256, "acme")]
    answer = ledger_pb2.ReportResponse(
        currency="USD", rows=rows, total=ledger_pb2.ReportRow(requests=14, cost_nano=246)
    )
    wide = console(170)
    cost.show_report(wide, answer, [By.TENANT], changes=False)
    shown = wide.file.getvalue()
    assert shown.count("0.000000123") == 2
    assert "1,000 requests USD" in shown
    assert "t" * 39 + "…" in shown


def test_a_tenant_named_in_markup_is_shown_as_it_is():
    row = ledger_pb2.ReportRow(tenant="[/x]", request=ledger_pb2.RequestDetail(trace_id="[/y]"))
    answer = ledger_pb2.ReportResponse(currency="USD", rows=[row], warnings=["no price for worker type '[/z]'"])
    wide = console(170)
    cost.show_report(wide, answer, [By.TENANT], changes=False)
    budget = ledger_pb2.Budget(tenant="[/b]", period=ledger_pb2.PERIOD_DAY)
    wide.print(budgets.listing(ledger_pb2.ListBudgetsResponse(budgets=[ledger_pb2.BudgetState(budget=budget)])))
    advice.show(wide, ledger_pb2.AdviseResponse(recommendations=[ledger_pb2.Recommendation(advice="[/a]")]))
    shown = wide.file.getvalue()
    assert all(name in shown for name in ("[/x]", "[/y]", "[/z]", "[/b]", "[/a]"))


def test_budgets_are_listed_by_period():
    state = ledger_pb2.BudgetState(
        budget=ledger_pb2.Budget(tenant="acme", period=ledger_pb2.PERIOD_MONTH, hard_nano=10**9, currency="USD")
    )
    wide = console(170)
    wide.print(budgets.listing(ledger_pb2.ListBudgetsResponse(budgets=[state])))
    head, row = wide.file.getvalue().splitlines()
    assert head.split()[:3] == ["tenant", "model", "period"]
    assert row.split()[:3] == ["acme", "all", "month"]
