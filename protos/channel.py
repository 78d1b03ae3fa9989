"""How a channel to Ringmesh should be set up: shipped beside the stubs, needs nothing but them.

Calls go to all routers that the target names and that are serving; one that dies or leaves costs no call: what it
had not answered is made again elsewhere, unless too many calls fail (gRFC A6).
"""

from __future__ import annotations

import json
from typing import Any

_SERVICE = "inference.GRPCInferenceService"
# What may be made twice. Not streams; and a sequence, which may not, uses a channel without retries.
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
# Calls by the capacity that a router's answers tell: their number a second over how busy it was. What does not know
# it takes the next in the list.
_WEIGHTED = {
    "weighted_round_robin": {
        "enableOobLoadReport": False,
        # A router that is new to the channel is believed after this, and one that says nothing for so long is not.
        "blackoutPeriod": "2s",
        "weightExpirationPeriod": "30s",
        "weightUpdatePeriod": "1s",
    }
}
_BALANCING = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A router that drains, or has no worker, gets no calls.
    "healthCheckConfig": {"serviceName": ""},
}

SERVICE_CONFIG = json.dumps(_BALANCING | _RETRIES)


def channel_options(*, retries: bool = True, weighted: bool = False) -> list[tuple[str, Any]]:
    """For `grpc.insecure_channel`, `grpc.aio.insecure_channel`, and `channel_args` of tritonclient.

    `retries=False` for sequences, whose steps must not run twice. `weighted=True` where routers are not equally fast:
    each gets calls by its capacity instead of in turn.
    """
    config = _BALANCING | (_RETRIES if retries else {})
    if weighted:
        config |= {"loadBalancingConfig": [_WEIGHTED, *_BALANCING["loadBalancingConfig"]]}
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", int(retries)),
        # Of a target with several addresses gRPC makes an authority that is none, which the routers' HTTP/2 refuses.
        ("grpc.default_authority", "ringmesh"),
        # A router whose host vanished is noticed within 15 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # A router that comes back is found this soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A router says itself what is too large.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
