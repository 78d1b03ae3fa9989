"""What the router and the workers share in speaking the v2 protocol."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TypeAlias, cast

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.rpc import Context, Handler, Lane, Metadata, Service, unary

ReadyCheck: TypeAlias = Callable[[], bool]

_NO_LANES: Mapping[str, Lane] = {}
EXTENSIONS = ("binary_tensor_data", "parameters", "classification")


def service(is_ready: ReadyCheck, handlers: Mapping[str, Handler], lanes: Mapping[str, Lane] = _NO_LANES) -> Service:
    """`inference.GRPCInferenceService` of `handlers`, with what is the same on every server."""
    metadata = v2.ServerMetadataResponse(name="ringmesh", version=version("ringmesh-server"), extensions=EXTENSIONS)

    async def live(_: v2.ServerLiveRequest, __: Context) -> v2.ServerLiveResponse:
        return v2.ServerLiveResponse(live=True)

    async def ready(_: v2.ServerReadyRequest, __: Context) -> v2.ServerReadyResponse:
        return v2.ServerReadyResponse(ready=is_ready())

    async def server_metadata(_: v2.ServerMetadataRequest, __: Context) -> v2.ServerMetadataResponse:
        return metadata

    return Service(
        v2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        {
            "ServerLive": unary(v2.ServerLiveRequest, live),
            "ServerReady": unary(v2.ServerReadyRequest, ready),
            "ServerMetadata": unary(v2.ServerMetadataRequest, server_metadata),
            **handlers,
        },
        lanes,
    )


def with_id(response: bytes, request_id: str) -> bytes:
    """A serialized ModelInferResponse with this id: on the wire, the last value of a field wins."""
    if not request_id:
        return response
    encoded = request_id.encode()
    return b"".join((response, b"\x1a", _varint(len(encoded)), encoded))  # field 3, length-delimited


def metadata(context: Context) -> Metadata:
    """What the caller sent beside the request."""
    return tuple(context.invocation_metadata() or ())


def traceparent(sent: Metadata) -> str | None:
    """The caller's W3C trace context, where it sent one."""
    for key, value in sent:
        if key == "traceparent":
            return value if isinstance(value, str) else None
    return None


def deadline(context: Context) -> float | None:
    """When the caller's time is up, in time.monotonic; None where it set no deadline."""
    # grpcio says None where there is no deadline, pygrpc-native sys.maxsize.
    remaining = cast("float | None", context.time_remaining())
    if remaining is None or remaining >= sys.maxsize:
        return None
    return time.monotonic() + remaining


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
