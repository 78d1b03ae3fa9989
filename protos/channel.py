"""Options of a channel to Ringmesh.

Calls are spread over all serving routers that the target names. Calls that a router leaves unanswered when it dies or
stops are retried at another one, unless too many calls fail (gRFC A6).
"""

from __future__ import annotations

import json
from typing import Any

_SERVICE = "inference.GRPCInferenceService"
# Calls that may be retried. Streams may not; sequences use a channel without retries.
_REPEATABLE = (
    "ModelInfer",
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
)
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE, "method": method} for method in _REPEATABLE],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Retries stop while more than one call in eleven fails.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
# Calls in proportion to the capacity that answers report. Clients without this policy use the next in the list.
_WEIGHTED = {
    "weighted_round_robin": {
        "enableOobLoadReport": False,
        # When reports of a new router count, and when reports are too old to count.
        "blackoutPeriod": "2s",
        "weightExpirationPeriod": "30s",
        "weightUpdatePeriod": "1s",
    }
}
_BALANCING = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A draining router, or one without workers, gets no calls.
    "healthCheckConfig": {"serviceName": ""},
}

SERVICE_CONFIG = json.dumps(_BALANCING | _RETRIES)


def channel_options(
    *, retries: bool = True, weighted: bool = False, authority: str = "ringmesh"
) -> list[tuple[str, Any]]:
    """For channels of `grpc` and `grpc.aio`, and `channel_args` of tritonclient.

    `retries=False` is for sequences, whose steps must not run twice. `weighted=True` is for routers of unequal speed:
    each gets calls in proportion to its capacity. `authority`: with TLS, a name or address that the certificates of all
    routers have; without, any name.
    """
    config = _BALANCING | (_RETRIES if retries else {})
    if weighted:
        config |= {"loadBalancingConfig": [_WEIGHTED, *_BALANCING["loadBalancingConfig"]]}
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", int(retries)),
        # For a target with several addresses, gRPC makes an invalid authority, which HTTP/2 servers refuse.
        ("grpc.default_authority", authority),
        # Detects a vanished host within 15 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # gRPC 1.85 has this in place of the former.
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Finds a restarted router soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Routers have limits of their own.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
