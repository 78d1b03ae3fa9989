"""An OTLP collector that accepts everything and parses nothing, so that only the cost of sending is measured."""

import asyncio
import os
from types import SimpleNamespace

import grpc

from services.runtime.rpc.rpc import Service
from services.runtime.rpc.server import Engine, Server


async def main() -> None:
    async def export(data, _):
        return b""

    service = Service(
        SimpleNamespace(full_name="opentelemetry.proto.collector.trace.v1.TraceService"),
        {"Export": grpc.unary_unary_rpc_method_handler(export)},
    )
    server = Server(
        Engine.NATIVE, os.environ["RINGMESH_ADDRESS"], [service], max_message_bytes=64 << 20, max_connection_age=3600
    )
    await server.start()
    server.set_serving(True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
