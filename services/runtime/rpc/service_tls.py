"""Mutual TLS of calls between services: certificates that may be replaced while channels are in use."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc

from services.runtime.rpc.tls import Followed, TlsFiles

_LOOK_SECONDS = 1.0
# Calls on a replaced connection have this long to end.
_GRACE_SECONDS = 60.0
# A stream that only waits would never notice that the other host has vanished.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    # keepalive_timeout_ms has no effect in gRPC 1.85, which waits a minute for any ping.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class ServiceTls:
    """The certificate and key of this service, and the CAs (`client_ca`) of the services that it calls.

    Their certificates must name the host that is called. Changed files apply to new connections; files that do not fit
    together change nothing.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises TlsError."""
        self._looked = time.monotonic()
        self._followed = Followed(files, partial(_read, files), "certificates for calls to services")

    @property
    def context(self) -> ssl.SSLContext:
        """For connections of asyncio."""
        return self._current()[0]

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """For channels of grpcio; another object after a change."""
        return self._current()[1]

    def _current(self) -> tuple[ssl.SSLContext, grpc.ChannelCredentials]:
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._followed.follow()
        return self._followed.value


def _read(files: TlsFiles) -> tuple[ssl.SSLContext, grpc.ChannelCredentials]:
    files.check()
    context = ssl.create_default_context(cafile=files.client_ca)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(files.certificate, files.key)
    ca = files.client_ca.read_bytes() if files.client_ca is not None else None
    return context, grpc.ssl_channel_credentials(ca, files.key.read_bytes(), files.certificate.read_bytes())


def open_channel(
    address: str,
    options: Sequence[tuple[str, Any]],
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    tls: ServiceTls | None = None,
) -> grpc.aio.Channel:
    """Returns a channel to a service, with `tls` unless it is None or the address a Unix socket.

    A call that waits for a host that has vanished ends with UNAVAILABLE within 15 s.
    """
    options = (*options, *_KEEPALIVE)
    if tls is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    made: Any = _ReloadedChannel(address, options, interceptors, tls)
    return made  # type: ignore[no-any-return] # all of a channel that stubs use


class _ReloadedChannel:
    """Connects anew when the certificates have changed."""

    def __init__(
        self,
        address: str,
        options: Sequence[tuple[str, Any]],
        interceptors: Sequence[grpc.aio.ClientInterceptor],
        tls: ServiceTls,
    ) -> None:
        self._arguments = address, options, interceptors
        self._tls = tls
        self._credentials: grpc.ChannelCredentials | None = None
        self._channel: grpc.aio.Channel | None = None

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, "unary_unary", arguments, named)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, "unary_stream", arguments, named)

    async def close(self, grace: float | None = None) -> None:
        if self._channel is not None:
            await self._channel.close(grace)

    def current(self) -> grpc.aio.Channel:
        credentials = self._tls.credentials
        if self._channel is None or credentials is not self._credentials:
            address, options, interceptors = self._arguments
            if self._channel is not None:
                self._closing = asyncio.ensure_future(self._channel.close(_GRACE_SECONDS))
            self._credentials = credentials
            self._channel = grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
        return self._channel


class _Method:
    def __init__(self, channel: _ReloadedChannel, kind: str, arguments: Any, named: Any) -> None:
        self._channel, self._kind, self._arguments, self._named = channel, kind, arguments, named
        self._made_on: grpc.aio.Channel | None = None
        self._method: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        channel = self._channel.current()
        if channel is not self._made_on:
            self._made_on = channel
            self._method = getattr(channel, self._kind)(*self._arguments, **self._named)
        return self._method(*arguments, **named)
