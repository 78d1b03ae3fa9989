"""A gRPC server on either engine, with health, reflection and channelz beside what it serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2

from services.runtime import reflection
from services.runtime.health import Health
from services.runtime.rpc import Service

log = logging.getLogger(__name__)


class Engine(StrEnum):
    """What does the HTTP/2 work: Rust outside the GIL (pygrpc-native), or grpcio's own C core."""

    NATIVE = "native"
    GRPCIO = "grpcio"


class StartError(Exception):
    """The process cannot start; the message says why in one line."""


def _create(engine: Engine, options: list[tuple[str, Any]], services: Sequence[Service]) -> grpc.aio.Server:
    if engine is Engine.NATIVE:
        try:
            from services.runtime.fast_lane import FastLaneServer
        except ImportError:
            log.warning("pygrpc-native has no wheel here; serving with grpcio, which is slower")
        else:
            lanes = {
                f"/{service.name}/{method}": lane for service in services for method, lane in service.lanes.items()
            }
            return FastLaneServer(options, lanes)
    # Long-lived channels find new backends only when a connection ends, and streams on it may; the native engine
    # cannot end connections by age.
    return grpc.aio.server(options=[*options, ("grpc.max_connection_age_ms", 300_000)])


class Server:
    """Serves `services` on one address; not ready until `set_serving`, drained by `stop`.

    Requests above `max_message_bytes` are answered RESOURCE_EXHAUSTED.
    """

    def __init__(self, engine: Engine, address: str, services: Sequence[Service], *, max_message_bytes: int) -> None:
        self._address = address
        self._services = services
        self.health = Health(service.name for service in services)
        self._server = _create(
            engine,
            [
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Without this, grpcio lets a second server take the same port unnoticed.
                ("grpc.so_reuseport", 0),
            ],
            services,
        )

    async def start(self) -> int:
        """Binds, starts answering (NOT_SERVING), and returns the port. Raises StartError where the address is taken."""
        services = [*self._services, self.health.service()]
        for service in services:
            self._server.add_registered_method_handlers(service.name, dict(service.handlers))
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service.name, dict(service.handlers)),)
            )
        channelz.add_channelz_servicer(self._server)
        channelz_name: str = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
        names = [*(service.name for service in services), channelz_name]
        for name, handlers in reflection.handlers(names).items():
            self._server.add_registered_method_handlers(name, handlers)
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError:
            raise StartError(
                f"cannot listen on {self._address}: the port is taken or the address is not ours"
            ) from None
        await self._server.start()
        return port

    def set_serving(self, serving: bool) -> None:
        """Whether load balancers and callers should send requests here."""
        self.health.set_serving(serving)

    async def stop(self, grace: float) -> None:
        """Turns away new requests, waits up to `grace` seconds for those under way, then ends the rest."""
        self.health.set_serving(False)
        self.health.close()
        await self._server.stop(grace)
