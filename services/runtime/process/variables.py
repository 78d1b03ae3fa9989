"""The RINGMESH_* variables that no process of Ringmesh reads, such as misspelt ones."""

from __future__ import annotations

from collections.abc import Mapping

from services.runtime.oip.absent_model import nearest

_PREFIX = "RINGMESH_"
# The settings of all services, because several services may share one environment.
_SETTINGS = """
BYTE_QUOTAS CACHE_QUOTAS CONCURRENCY_QUOTAS MODEL_KEYS USAGE_TENANTS
ADDRESS ADMIN_NETWORKS ADVERTISE API_KEY API_KEYS AUDIT_LOG AUDIT_SHARE CACHE_ADDRESS CONFIG CONSOLE_HOSTS
CPU_SECOND_PRICE CURRENCY DATABASE_URL DECISIONS_BYTES DISCOVERY_URL DRAIN_SECONDS ENGINE GPU_SECOND_PRICE HTTP_ADDRESS
JWT_AUDIENCE JWT_CLAIM_PREFIX JWT_ISSUER JWT_KEYS JWT_SKEW_SECONDS KEY_SECRET LEDGER_ADDRESS LOCAL_TIER_BYTES LOG_FORMAT
LOG_LEVEL MAX_BATCH_ROWS MAX_CONNECTION_AGE_SECONDS MAX_MESSAGE_BYTES MAX_UNREAD_BYTES MEMORY_GB_HOUR_PRICE
METRICS_ADDRESS METRICS_TARGETS MINUTE_DAYS MODELS MODEL_MEMORY_BYTES OTLP_ENDPOINT PEER_BYTES_PER_SECOND PEER_REGIONS
POLL_SECONDS PURGE_LEASE_SECONDS QUEUE_SECONDS QUOTAS REDIS_URL REFUSAL_SECONDS REGION REPLICA_URL ROLLUP_DAYS ROUTERS
ROUTER_SECOND_PRICE SERVICE_CA SERVICE_CERTIFICATE SERVICE_KEY SERVICE_NAMES SHARED_ADMISSION SHARED_BUDGET_SECONDS
SHARED_MEMORY_PREFIX SHARED_TTL_SECONDS SHARE_PORT SLO_AVAILABILITY SLO_LATENCY SLO_LATENCY_SECONDS SOCKET_DIR STATE_DIR
THREADS TLS_CERTIFICATE TLS_CLIENT_CA TLS_KEY TRACE_DIR TRACE_RATIO TRACE_STORE_BYTES TRACE_STORE_TRACES TRACE_UI
TRITON_METRICS USAGE_DAYS USAGE_DIR USAGE_SPOOL_BYTES WEIGHT WORKERS WORKER_ID ZONE
"""
KNOWN = frozenset(_SETTINGS.split())


def unknown(environment: Mapping[str, str]) -> list[str]:
    """Returns a message for each unknown variable, with the nearest known name if there is one."""
    # Kubernetes sets such variables for a service that is called ringmesh-something.
    services = tuple(name.removesuffix("SERVICE_HOST") for name in environment if name.endswith("_SERVICE_HOST"))
    messages = []
    for name in sorted(environment):
        short = name.removeprefix(_PREFIX)
        if name != short and short not in KNOWN and not name.startswith(services):
            near = nearest(short, KNOWN)
            hint = f"; did you mean {_PREFIX}{near}?" if near else ""
            messages.append(f"the variable {name} is unknown and has no effect{hint}")
    return messages
