"""Settings: defaults, then a TOML file (RINGMESH_CONFIG), then RINGMESH_* variables."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, IPvAnyNetwork, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from services.runtime.process import units
from services.runtime.rpc.access import LOOPBACK, Access, credential_of
from services.runtime.rpc.api_keys import ApiKeys, KeyFileError, field_and_fault
from services.runtime.rpc.audit_log import AuditLog
from services.runtime.rpc.backlog import MAX_UNREAD_BYTES
from services.runtime.rpc.calls import Calls
from services.runtime.rpc.rpc import Service
from services.runtime.rpc.server import Engine, Server, StartError
from services.runtime.rpc.service_tls import ServiceTls
from services.runtime.rpc.tls import TlsFiles
from services.runtime.rpc.tokens import KeySetError, Tokens
from services.runtime.telemetry.logs import LogFormat
from services.runtime.telemetry.span_export import Collector, SpanFolder, SpanQueue
from services.runtime.telemetry.spans import Process, this_process
from services.runtime.telemetry.tracing import Tracer

# Settings whose names contain one of these may hold a password.
_SECRET = ("SECRET", "URL", "KEY", "MODELS", "ENDPOINT")


def is_host_port(address: str, lowest: int = 1) -> bool:
    """Whether a process can be called there, as far as the text tells. `lowest`: 0 where a port is to be chosen."""
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdecimal() and len(port) <= 5
    return bool(host) and " " not in host and is_number and lowest <= int(port) < 1 << 16


def split(value: object) -> object:
    """Splits text at its commas; returns other values unchanged."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class ServiceSettings(BaseSettings):
    """The settings common to all services. In the file: the tables `[common]` and the service's own `[section]`."""

    model_config = SettingsConfigDict(env_prefix="RINGMESH_", extra="forbid", frozen=True, allow_inf_nan=False)
    section: ClassVar[str]

    address: str = Field("127.0.0.1:0", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_address: str = Field("127.0.0.1:0", description="host:port to serve /metrics on; port 0 takes a free one")
    engine: Engine = Field(Engine.NATIVE, description="what does the HTTP/2 work: native (our own) or grpcio")
    max_message_bytes: int = Field(128 << 20, gt=0, description="largest request taken")
    max_unread_bytes: int = Field(
        MAX_UNREAD_BYTES, gt=0, description="answers that callers have not read, beyond which slow ones are cut"
    )
    max_connection_age_seconds: float = Field(
        300.0, gt=0, description="when the client of a connection is asked to open another, which may find new servers"
    )
    drain_seconds: float = Field(15.0, ge=0, description="time for requests under way after SIGTERM")
    # Tenants must not know it: with it they could search for colliding inputs, and forge entries in Redis.
    key_secret: str | None = Field(
        None,
        min_length=1,
        description="secret for request hashes, cache entries and the credentials of services; the "
        "same on every process of a fleet; none: routers and caches take a random one for themselves, which "
        "only works without Redis, peer regions and workers on other hosts",
    )
    admin_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(split)] = Field(
        LOOPBACK, description="networks from which callers may operate and administrate, separated by commas"
    )
    api_keys: Path | None = Field(
        None, description="file of API keys (services/runtime/rpc/api_keys.py); none: callers have no identity"
    )
    jwt_keys: str | None = Field(
        None, description="JWKS, a file or an https URL, that verifies tokens of callers; none: there are no tokens"
    )
    jwt_issuer: str = Field("", description="issuer (`iss`) of the tokens")
    jwt_audience: str = Field("", description="what tokens have in `aud`")
    jwt_skew_seconds: float = Field(30.0, ge=0, le=600, description="by how much the issuer's clock may differ")
    jwt_claim_prefix: str = Field("", description="what the claims tenant, roles and models begin with")
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate chain of a server that ends TLS itself; needs the engine grpcio",
    )
    tls_key: Path | None = Field(None, description="PEM file with its key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file with the CAs of clients, which then need a certificate; none: clients need none"
    )
    service_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate chain for calls to other services and /metrics; none: plain text",
    )
    service_key: Path | None = Field(None, description="PEM file with its key")
    service_ca: Path | None = Field(None, description="PEM file with the CAs of other services")
    service_names: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)] = Field(
        (), description="SPIFFE ids or DNS names in the certificates of services of the fleet, separated by commas"
    )
    audit_log: Path | None = Field(None, description="file for the audit log; none: entries go to the process log")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    log_format: LogFormat = Field(LogFormat.TEXT, description="lines for people, or one JSON object a line")
    trace_ratio: float = Field(0.01, ge=0, le=1, description="share of requests traced where the caller does not say")
    trace_dir: Path | None = Field(None, description="folder that spans are written to, for `ringmesh trace`")
    otlp_endpoint: str | None = Field(None, description="URL of an OTLP/gRPC collector, such as http://127.0.0.1:4317")

    @field_validator("*", mode="before")
    @classmethod
    def _read_units(cls, value: object, field: ValidationInfo) -> object:
        name = field.field_name or ""
        if not isinstance(value, str):
            return value
        if name.endswith("_seconds"):
            return units.parse_seconds(value)
        return units.parse_bytes(value) if name.endswith(("_bytes", "_bytes_per_second")) else value

    @field_validator("address", "metrics_address", "cache_address", "ledger_address", check_fields=False)
    @classmethod
    def _check_address(cls, value: str | None, field: ValidationInfo) -> str | None:
        is_own, has_socket = field.field_name in ("address", "metrics_address"), field.field_name != "metrics_address"
        if value and not (is_host_port(value, 0 if is_own else 1) or (has_socket and value.startswith("unix:/"))):
            raise ValueError("must be host:port" + (" or unix:/path" if has_socket else ""))
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_collector(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"(https?://[^/\s]+|[^/\s]+:\d+)/?", value):
            raise ValueError("a collector is a URL such as http://host:4317 or https://host")
        return value

    def access(self) -> Access:
        """Who may call what on this process's server. Raises StartError if the API keys cannot be read."""
        try:
            keys = ApiKeys(self.api_keys) if self.api_keys is not None else None
        except KeyFileError as error:
            raise StartError(f"RINGMESH_API_KEYS: {error}") from None
        try:
            tokens = self._tokens()
        except KeySetError as error:
            raise StartError(f"RINGMESH_JWT_KEYS: {error}") from None
        audit = AuditLog(self.section, self.audit_log)
        return Access(
            self.address,
            self.admin_networks,
            credential_of(self.key_secret),
            keys,
            audit,
            tokens,
            verifies_certificates=self.tls_client_ca is not None,
            services=frozenset(self.service_names),
        )

    def service_files(self) -> TlsFiles | None:
        """The certificate of this process among the services of the fleet; None: plain text. Raises StartError."""
        if self.service_certificate is None and self.service_key is None and self.service_ca is None:
            return None
        if self.service_certificate is None or self.service_key is None or self.service_ca is None:
            raise StartError(
                "calls by TLS need RINGMESH_SERVICE_CERTIFICATE, RINGMESH_SERVICE_KEY and RINGMESH_SERVICE_CA"
            )
        return TlsFiles(self.service_certificate, self.service_key, self.service_ca)

    def service_tls(self) -> ServiceTls | None:
        """The TLS of calls to other services; None: plain text. Raises StartError and TlsError."""
        files = self.service_files()
        return ServiceTls(files) if files is not None else None

    def _tokens(self) -> Tokens | None:
        if self.jwt_keys is None:
            return None
        if not self.jwt_issuer or not self.jwt_audience:
            raise KeySetError("tokens also need RINGMESH_JWT_ISSUER and RINGMESH_JWT_AUDIENCE")
        return Tokens(self.jwt_keys, self.jwt_issuer, self.jwt_audience, self.jwt_skew_seconds, self.jwt_claim_prefix)

    def tls_files(self) -> TlsFiles | None:
        """The certificate that callers see; None: plain text. Raises StartError."""
        if self.tls_certificate is None and self.tls_key is None and self.tls_client_ca is None:
            return None
        if self.tls_certificate is None or self.tls_key is None:
            raise StartError("TLS needs both RINGMESH_TLS_CERTIFICATE and RINGMESH_TLS_KEY")
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    def tls(self) -> TlsFiles | None:
        """The TLS of this process's server; None: plain text. Raises StartError."""
        files = self.tls_files()
        if files is not None and self.engine is not Engine.GRPCIO:
            raise StartError(
                "the engine native has no TLS: set RINGMESH_ENGINE=grpcio, or put `ringmesh edge` in front of it"
            )
        return files

    def create_server(
        self, services: Sequence[Service], access: Access, *, calls: Calls | None = None, share_port: bool = False
    ) -> Server:
        return Server(
            self.engine,
            self.address,
            services,
            max_message_bytes=self.max_message_bytes,
            max_connection_age=self.max_connection_age_seconds,
            share_port=share_port,
            calls=calls,
            max_unread_bytes=self.max_unread_bytes,
            access=access,
            tls=self.tls(),
        )

    def create_tracer(self, instance: str = "") -> Tracer:
        """Returns a tracer with the configured destinations; without any, trace context is still propagated."""
        queues: list[SpanQueue[Any]] = []
        if self.trace_dir is not None:
            queues.append(SpanQueue(SpanFolder(self.trace_dir, self.section)))
        if self.otlp_endpoint is not None:
            queues.append(SpanQueue(Collector(self.otlp_endpoint)))
        process = Process(self.section, instance) if instance else this_process(self.section)
        return Tracer(process, self.trace_ratio, queues)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_file(cls.section))


def _read_file(section: str) -> dict[str, Any]:
    path = os.environ.get("RINGMESH_CONFIG")
    if not path:
        return {}
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartError(f"RINGMESH_CONFIG: cannot read {path}: {error}") from None
    return {**tables.get("common", {}), **tables.get(section, {})}


def describe(error: ValidationError) -> str:
    """Returns all errors in the settings on one line, by the names of their variables; without values that may be
    secret."""
    problems = []
    for problem in error.errors():
        _, message = field_and_fault(problem)
        if not problem["loc"]:  # of several settings together: the input is all settings
            problems.append(message)
            continue
        name = str(problem["loc"][0]).upper()
        secret = problem["type"] == "extra_forbidden" or any(word in name for word in _SECRET)
        problems.append(f"RINGMESH_{name}: {message}" + ("" if secret else f", got {problem['input']!r}"))
    return "; ".join(problems)
