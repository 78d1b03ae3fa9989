"""The data sources of the pages."""

from __future__ import annotations

from dataclasses import dataclass

from services.console.data import findings
from services.console.data.findings import Finding
from services.console.data.fleet_watch import FleetSnapshot, FleetWatch
from services.console.data.history import History
from services.console.data.ledger import LedgerReports
from services.console.data.scraper import Scraper
from services.console.data.trace_store import TraceStore


@dataclass(frozen=True, slots=True)
class Sources:
    """All data sources. `trace_ui` is the URL of a trace in Jaeger or Tempo, with `{trace_id}`; "" if there is none."""

    fleet: FleetWatch
    history: History
    scraper: Scraper
    traces: TraceStore
    trace_ui: str
    ledger: LedgerReports

    @property
    def view(self) -> FleetSnapshot:
        return self.fleet.view

    def outages(self) -> list[str]:
        return [
            f"The router at {router.address} does not answer ({router.problem}). This page shows its last answer."
            for router in self.view.routers
            if router.is_down
        ]

    def findings(self) -> list[Finding]:
        return findings.find(self.view, self.history, self.traces, self.scraper.problems)
