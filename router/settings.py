"""Settings of the router."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from cache.settings import MeshSettings
from router.balancing.member import Listing
from router.membership.discovery import AnnouncedWorkers, Watch, watch_dns
from services.runtime.process import units
from services.runtime.process.settings import is_host_port, split
from services.runtime.redis.discovery import connect

_DNS = "dns://"


class RouterSettings(MeshSettings):
    """The settings of a router."""

    section: ClassVar[str] = "router"
    address: str = Field("127.0.0.1:8001", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_address: str = Field("127.0.0.1:8002", description="host:port to serve /metrics on")
    workers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)] = Field(
        ("127.0.0.1:8100",),
        description="host:port of each worker, or dns://name:port for all behind a name, separated by commas",
    )
    discovery_url: str | None = Field(None, description="Redis that workers announce themselves in; none: `workers`")
    region: str = Field("", description="region of this router; its workers are preferred")
    zone: str = Field("", description="zone of this router; its workers are preferred for uncached requests")
    audit_share: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of hits that are recomputed and compared; 0: none",
    )
    slo_availability: float = Field(0.999, gt=0, lt=1, description="target share of answered requests")
    slo_latency: float = Field(0.99, gt=0, lt=1, description="target share of answers in time")
    slo_latency_seconds: float = Field(
        0.3, gt=0, description="longest time of such an answer; rounded up to a bucket's bound"
    )
    cpu_second_price: float = Field(0.00001, ge=0, description="price of a second of computing on CPUs")
    gpu_second_price: float = Field(0.0002, ge=0, description="price of a second of computing on a GPU")
    memory_gb_hour_price: float = Field(0.005, ge=0, description="price of an hour of 1 GB of the local tier's memory")
    currency: str = Field("USD", pattern=r"^[!-~]{1,8}$", description="of the prices; 1 to 8 characters")
    triton_metrics: bool = Field(False, description="whether /metrics also has Triton's names, nv_inference_*")
    ledger_address: str | None = Field(
        None, description="host:port of the ledger, which usage is sent to and which leases budgets; none: no ledger"
    )
    usage_dir: Path = Field(
        Path(".ringmesh/usage"), description="folder for usage until the ledger has it; each router has its own"
    )
    usage_spool_bytes: int = Field(1 << 30, ge=1 << 20, description="most bytes there; beyond, the oldest is dropped")
    usage_tenants: int = Field(
        1000,
        ge=1,
        description="tenants that usage is told apart by in a UTC day; further ones count as the tenant (other), "
        "unless they have a hard budget",
    )
    share_port: bool = Field(False, description="whether other routers with this setting may listen on the same port")
    queue_seconds: float = Field(
        0.2, gt=0, description="how long requests may queue for a worker on average before more are refused"
    )
    quotas: Annotated[dict[str, Annotated[float, Field(gt=0)]], NoDecode] = Field(
        {},
        description="computed requests a second by tenant, `acme=100,*=10` (*: each other tenant); none: no limits",
    )
    byte_quotas: Annotated[dict[str, Annotated[float, Field(gt=0)]], NoDecode] = Field(
        {}, description="bytes of requests a second by tenant, as `quotas`; sizes accept units"
    )
    concurrency_quotas: Annotated[dict[str, Annotated[int, Field(gt=0)]], NoDecode] = Field(
        {}, description="requests at once by tenant, as `quotas`; answers from the local tier do not count"
    )
    cache_quotas: Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], NoDecode] = Field(
        {}, description="share of the local tier by tenant, 0 to 1, as `quotas`"
    )

    @field_validator("quotas", "byte_quotas", "concurrency_quotas", "cache_quotas", mode="before")
    @classmethod
    def _parse(cls, value: object, field: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
        if not all(tenant.strip() and equals for tenant, equals, _ in pairs):
            raise ValueError("a quota is tenant=number")
        read = units.parse_bytes if field.field_name == "byte_quotas" else str
        return {tenant.strip(): read(rate) for tenant, _, rate in pairs}

    @field_validator("workers")
    @classmethod
    def _check(cls, workers: tuple[str, ...]) -> tuple[str, ...]:
        for worker in workers:
            if not is_host_port(worker.removeprefix(_DNS)):
                raise ValueError(f"{worker!r} is not host:port or dns://name:port")
        if len(set(workers)) != len(workers):
            raise ValueError("a worker is named twice")
        return workers

    @property
    def own_address(self) -> str:
        # Routers that share a port have the same `address`.
        return self.metrics_address if self.share_port else self.address

    def listings(self) -> list[Listing]:
        """The workers listed by address. Omits the default worker if workers announce themselves in Redis."""
        if self.discovery_url is not None and "workers" not in self.model_fields_set:
            return []
        return [Listing(worker) for worker in self.workers if not worker.startswith(_DNS)]

    def create_sources(self) -> dict[str, Watch]:
        """The dynamic sources of workers (DNS, announcements), by name. Raises StartError if the URL is invalid."""
        sources: dict[str, Watch] = {}
        for worker in self.workers:
            if worker.startswith(_DNS):
                host, _, port = worker.removeprefix(_DNS).rpartition(":")
                sources[worker] = partial(watch_dns, host, int(port))
        if self.discovery_url is not None:
            sources["announcements"] = AnnouncedWorkers(connect(self.discovery_url)).watch
        return sources
