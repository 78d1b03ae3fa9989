"""Settings of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from services.ledger.reports.money import CURRENCIES
from services.ledger.reports.prices import ROUTER
from services.ledger.storage.partitions import Retention
from services.ledger.storage.price_table import NO_END_MS, Price
from services.runtime.process.settings import ServiceSettings

_HOUR_SECONDS = 3600
_NANO = 10**9


class LedgerSettings(ServiceSettings):
    """Settings of the ledger process."""

    section: ClassVar[str] = "ledger"
    address: str = Field("127.0.0.1:8015", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_address: str = Field(
        "127.0.0.1:8016", description="host:port to serve /metrics on; port 0 takes a free one"
    )
    max_message_bytes: int = Field(32 << 20, gt=0, description="largest request taken")
    state_dir: Path = Path(".ringmesh/ledger")
    database_url: str | None = Field(
        None,
        pattern=r"^postgres(ql)?://",
        description="a PostgreSQL, as postgresql://user:password@host/database?sslmode=verify-full; none: one of the "
        "ledger's own, in the folder RINGMESH_STATE_DIR",
    )
    replica_url: str | None = Field(
        None, pattern=r"^postgres(ql)?://", description="a PostgreSQL that follows it, which reports are read from"
    )
    cache_address: str | None = Field(None, description="host:port of the cache service, for reports; none: not cached")
    usage_days: int = Field(35, ge=1, le=1100, description="days that single records are kept")
    minute_days: int = Field(3, ge=1, le=1100, description="days that sums by the minute are kept")
    rollup_days: int = Field(1100, ge=1, le=3660, description="days that sums by the hour, day and week are kept")
    currency: str = Field("USD", description="of all prices, by ISO 4217; a ledger keeps the one that it began with")
    cpu_second_price: float = Field(
        0.00001, ge=0, le=1000, description="price of a second of a worker of type cpu, until one is set"
    )
    gpu_second_price: float = Field(0.0002, ge=0, le=1000, description="likewise of type gpu")
    router_second_price: float = Field(0.00001, ge=0, le=1000, description="likewise of a router")

    @field_validator("currency")
    @classmethod
    def _is_known(cls, currency: str) -> str:
        if currency not in CURRENCIES:
            raise ValueError("is no currency of ISO 4217, such as EUR")
        return currency

    @model_validator(mode="after")
    def _keeps_in_order(self) -> LedgerSettings:
        if not self.minute_days <= self.usage_days <= self.rollup_days:
            raise ValueError(
                "RINGMESH_MINUTE_DAYS is at most RINGMESH_USAGE_DAYS, and that at most RINGMESH_ROLLUP_DAYS"
            )
        return self

    @property
    def retention(self) -> Retention:
        return Retention(self.usage_days, self.minute_days, self.rollup_days)

    def default_prices(self) -> list[Price]:
        """For worker types that have none."""
        seconds = {"cpu": self.cpu_second_price, "gpu": self.gpu_second_price, ROUTER: self.router_second_price}
        return [
            Price(
                worker_type,
                0,
                NO_END_MS,
                round(price * _HOUR_SECONDS * _NANO),
                "gpu" if worker_type == "gpu" else "cpu",
            )
            for worker_type, price in seconds.items()
        ]
