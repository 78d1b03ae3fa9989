"""What a router keeps of the requests that it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from router.accounting.budgets import Budgets
from router.accounting.cost import CostMetrics, Prices
from router.accounting.meter import Meter
from router.accounting.request_metrics import RequestMetrics
from services.runtime.telemetry.load_report import LoadReport
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.request_log import RequestLog


class Accounts(NamedTuple):
    """The metrics, log, cost and load of all requests, and their usage; `meter`: None if there is no ledger."""

    requests: RequestMetrics
    log: RequestLog
    cost: CostMetrics
    load: LoadReport
    budgets: Budgets
    meter: Meter | None

    @classmethod
    def create(
        cls,
        prices: Prices,
        provider: Callable[[str, str], str],
        held: Callable[[], int],
        cores: int,
        usage_tenants: int | None,
    ) -> Accounts:
        """`provider` and `held` as in CostMetrics, `cores` as in LoadReport. `usage_tenants`: None: no ledger."""
        requests, budgets = RequestMetrics(), Budgets()
        return cls(
            requests,
            RequestLog(time.monotonic),
            CostMetrics(prices, requests, provider, held, time.monotonic),
            LoadReport(requests.answers, cores),
            budgets,
            Meter(budgets, usage_tenants) if usage_tenants is not None else None,
        )

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        for part in (self.requests, self.log, self.cost):
            yield from part.samples()
