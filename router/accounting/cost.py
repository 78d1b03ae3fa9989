"""The cost of answers (compute time times the price per second of the hardware) and of the local tier's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from router.accounting.meter import COMPUTED, CPU, device_of
from router.accounting.request_metrics import RequestMetrics
from services.runtime.errors import NotFoundError, UnavailableError
from services.runtime.telemetry.metrics import Family, Sample

COST = Family(
    "ringmesh_cost_total",
    "counter",
    "cost in the currency of the settings; kind: compute spent, or saved by hits and joins; memory of the local tier",
    ("model", "version", "tenant", "kind"),
)
PRICE = Family(
    "ringmesh_price",
    "gauge",
    "price of one unit, as the settings have it; unit: cpu_second, gpu_second, memory_gb_hour",
    ("unit", "currency"),
)


class Prices(NamedTuple):
    """Prices of a second of computing, and of holding 10**9 bytes for an hour. `currency` is for display only."""

    cpu_second: float
    gpu_second: float
    memory_gb_hour: float = 0.0
    currency: str = ""

    def of(self, provider: str) -> float:
        """The price of one second of a model that runs on `provider`."""
        return self.cpu_second if device_of(provider) == CPU else self.gpu_second


class CostMetrics:
    """Prices the compute time in `requests`, and the bytes that `held` returns, from one scrape to the next.

    `provider` returns the execution provider of a model by name and version, and raises as Catalog.find. `clock` as
    time.monotonic.
    """

    def __init__(
        self,
        prices: Prices,
        requests: RequestMetrics,
        provider: Callable[[str, str], str],
        held: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._prices = prices
        self._requests = requests
        self._find_provider = provider
        self._held = held
        self._clock = clock
        self._asked_at = clock()
        self._byte_seconds = 0.0
        # Models that no worker holds any more keep their last provider.
        self._providers: dict[tuple[str, str], str] = {}

    def samples(self) -> Iterator[Sample]:
        totals: dict[tuple[str, str, str, str], float] = {}
        for (model, version, tenant, outcome), us in self._requests.compute_us().items():
            key = (model, version, tenant, "spent" if outcome in COMPUTED else "saved")
            totals[key] = totals.get(key, 0.0) + us / 1e6 * self._prices.of(self._provider(model, version))
        for key, amount in totals.items():
            yield Sample(COST, key, amount)
        now = self._clock()
        self._byte_seconds += self._held() * (now - self._asked_at)
        self._asked_at = now
        yield Sample(COST, ("", "", "", "memory"), self._byte_seconds / 1e9 / 3600 * self._prices.memory_gb_hour)
        for unit in ("cpu_second", "gpu_second", "memory_gb_hour"):
            yield Sample(PRICE, (unit, self._prices.currency), getattr(self._prices, unit))

    def of(self, provider: str, compute_us: int) -> float:
        return compute_us / 1e6 * self._prices.of(provider)

    def _provider(self, model: str, version: str) -> str:
        try:
            found = self._find_provider(model, version)
        except (NotFoundError, UnavailableError):
            return self._providers.get((model, version), "")
        self._providers[model, version] = found
        return found
