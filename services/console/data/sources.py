"""All that the pages are made of."""

from __future__ import annotations

from dataclasses import dataclass

from services.console.data import findings
from services.console.data.findings import Finding
from services.console.data.fleet_watch import FleetView, FleetWatch
from services.console.data.history import History
from services.console.data.scraper import Scraper
from services.console.data.trace_store import TraceStore


@dataclass(frozen=True, slots=True)
class Sources:
    """`trace_ui` is the URL of a trace in Jaeger or Tempo, with `{trace_id}` in it; "" where there is none."""

    fleet: FleetWatch
    history: History
    scraper: Scraper
    traces: TraceStore
    trace_ui: str

    @property
    def view(self) -> FleetView:
        """The fleet as it was seen last."""
        return self.fleet.view

    def unheard(self) -> list[str]:
        """The routers that do not answer, in words."""
        return [
            f"The router at {router.address} does not answer ({router.problem}): what it said last stands here."
            for router in self.view.routers
            if router.problem and router.problem != "not asked yet"
        ]

    def findings(self) -> list[Finding]:
        """What needs attention now, the worst first."""
        return findings.find(self.view, self.history, self.traces, self.scraper.problems)
