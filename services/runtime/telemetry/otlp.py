"""Channels to an OTLP/gRPC collector."""

from __future__ import annotations

import grpc


def open_channel(endpoint: str) -> grpc.aio.Channel:
    """Opens a channel to a URL such as http://127.0.0.1:4317; https uses TLS."""
    scheme, _, rest = endpoint.rpartition("://")
    options = [("grpc.max_reconnect_backoff_ms", 5000)]
    if scheme == "https":
        return grpc.aio.secure_channel(rest.rstrip("/"), grpc.ssl_channel_credentials(), options)
    return grpc.aio.insecure_channel(rest.rstrip("/"), options)
