"""What computing costs: a price a second of each kind of hardware times the compute time of each model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from router.fleet import Fleet
from router.request_metrics import RequestMetrics
from services.runtime.errors import NotFoundError, UnavailableError
from services.runtime.metrics import Family, Sample

COST = Family(
    "ringmesh_cost_total",
    "counter",
    "price of the compute time, in the currency of the settings; kind: spent, or saved by hits and joins",
    ("model", "version", "tenant", "kind"),
)

_SPENT = frozenset({"miss", "bypass"})
_CPU = "CPUExecutionProvider"


class Prices(NamedTuple):
    """Of one second, in any currency."""

    cpu_second: float
    gpu_second: float

    def of(self, provider: str) -> float:
        """Of a second of a model that `provider` runs."""
        return self.cpu_second if provider in (_CPU, "ensemble", "") else self.gpu_second


class Cost:
    """Prices what `requests` counted."""

    def __init__(self, prices: Prices, requests: RequestMetrics, fleet: Fleet) -> None:
        self._prices = prices
        self._requests = requests
        self._fleet = fleet
        # Models that nobody holds any more keep the provider they had.
        self._providers: dict[tuple[str, str], str] = {}

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        totals: dict[tuple[str, str, str, str], float] = {}
        for (model, version, tenant, outcome), us in self._requests.compute_us().items():
            key = (model, version, tenant, "spent" if outcome in _SPENT else "saved")
            totals[key] = totals.get(key, 0.0) + us / 1e6 * self._prices.of(self._provider(model, version))
        for key, amount in totals.items():
            yield Sample(COST, key, amount)

    def of(self, provider: str, compute_us: int) -> float:
        """Of one answer."""
        return compute_us / 1e6 * self._prices.of(provider)

    def _provider(self, model: str, version: str) -> str:
        try:
            found = self._fleet.view.catalog.find(model, version).provider
        except (NotFoundError, UnavailableError):
            return self._providers.get((model, version), "")
        self._providers[model, version] = found
        return found
