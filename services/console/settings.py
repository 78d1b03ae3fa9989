"""Settings of the console."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeAlias

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import NoDecode

from services.runtime.process.settings import ServiceSettings, is_host_port, split
from services.runtime.rpc.access import is_local
from services.runtime.rpc.tls import TlsFiles

Addresses: TypeAlias = str | tuple[str, ...] | dict[str, str]


class ConsoleSettings(ServiceSettings):
    """Settings of the console process."""

    section: ClassVar[str] = "console"
    address: str = Field("127.0.0.1:8013", description="host:port for spans by OTLP/gRPC")
    max_message_bytes: int = Field(16 << 20, gt=0, description="largest request accepted")
    http_address: str = Field("127.0.0.1:8080", description="host:port of the pages")
    console_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)] = Field(
        (), description="accepted host names of the pages, besides IP addresses and localhost"
    )
    routers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)] = Field(
        ("127.0.0.1:8001",), description="host:port of each router, separated by commas"
    )
    cache_address: str = Field("127.0.0.1:8010", description="host:port of the cache service")
    ledger_address: str = Field("", description="host:port of the ledger; empty: none")
    metrics_address: str = Field(
        "127.0.0.1:8014", description="host:port to serve /metrics on; port 0 takes a free one"
    )
    metrics_targets: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="/metrics to read: name=host:port of each process, separated by commas; name workers by their ids",
    )
    trace_store_bytes: int = Field(64 << 20, gt=0, description="memory for traces")
    trace_store_traces: int = Field(20_000, gt=0, description="number of traces kept")
    trace_ui: str = Field("", pattern=r"^(https?://[^\s]*\{trace_id\}[^\s]*)?$", description="URL of a trace elsewhere")

    def tls(self) -> TlsFiles | None:
        """The TLS for spans; from this host only they come in plain text. The pages have that of callers."""
        return None if is_local(self.address) else super().tls()

    @field_validator("metrics_targets", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        return {name.strip(): address.strip() for name, _, address in pairs}

    @field_validator("routers", "cache_address", "http_address", "metrics_targets")
    @classmethod
    def _check(cls, value: Addresses) -> Addresses:
        for address in [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value:
            if not (is_host_port(address) or address.startswith("unix:/")):
                raise ValueError(f"{address!r} must be host:port or unix:/path")
        if value == ():
            raise ValueError("must list at least one router")
        return value
