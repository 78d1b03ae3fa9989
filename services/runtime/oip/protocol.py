"""The parts of the v2 protocol that the router and the workers share."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias, cast

import grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import driver, wire
from services.runtime.errors import InvalidArgumentError, RingmeshError
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.rpc.access import AUTHORIZATION, CREDENTIAL, Access
from services.runtime.rpc.client_certificate import CLIENT_CERTIFICATE
from services.runtime.rpc.identity import Identity
from services.runtime.rpc.rpc import (
    Answer,
    Context,
    Failure,
    FastPath,
    Handler,
    Metadata,
    Service,
    abort,
    check_metadata,
    metadata,
    unary,
)
from services.runtime.telemetry.spans import Value, rpc_attributes

ReadyCheck: TypeAlias = Callable[[], bool]

TENANT = "ringmesh-tenant"
PRIORITY = "ringmesh-priority"
CACHE_CONTROL = "cache-control"
# A parameter of requests: whose sequence it is, as a router or a worker has found. Tenants may use the same ids.
SEQUENCE_TENANT = "ringmesh_sequence_tenant"
# Maximum length of a tenant's name in characters.
MAX_TENANT = 256

EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
# A parameter of RepositoryModelLoad and Unload: the time of the router's decision for the fleet, in ns since the Unix
# epoch.
DECIDED_NS = "ringmesh_decided_ns"
_SERVICE = v2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


def service(is_ready: ReadyCheck, handlers: Mapping[str, Handler], fast_paths: Mapping[str, FastPath]) -> Service:
    """Returns `inference.GRPCInferenceService` with `handlers` and the methods that are the same on every server."""
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
            **{method: fast_path_handler(path) for method, path in fast_paths.items()},
            **handlers,
        },
        fast_paths,
    )


def fast_path_handler(path: FastPath) -> Handler:
    """Returns a handler that runs `path` on engines without fast paths."""

    async def call(data: bytes, context: Context) -> bytes:
        sent, until = metadata(context), deadline(context)
        try:
            check_metadata(sent)
            answer = await driver.run(path(data, sent, until), until)
        except RingmeshError as error:
            await abort(context, error)
        body = await whole(answer) if isinstance(answer, Answer) else b""
        if answer.afterwards is not None:
            answer.afterwards()
        if isinstance(answer, Failure):
            await context.abort(answer.code, answer.message, tuple(answer.trailing))
        context.set_trailing_metadata(tuple(answer.trailing))
        return body

    return grpc.unary_unary_rpc_method_handler(call)


async def whole(answer: Answer) -> bytes:
    return await asyncio.to_thread(answer.whole) if answer.pieces else answer.body


def answered(
    response: bytes, request_id: str, trailing: Metadata, afterwards: Callable[[], None] | None = None
) -> Answer:
    """Returns `response` with this id appended as a field: on the wire, the last value of a field wins."""
    if not request_id:
        return Answer(response, trailing, afterwards)
    end = wire.field(3, request_id.encode())
    if len(response) > LARGE_BYTES:
        return Answer(response, trailing, afterwards, (end,))
    return Answer(response + end, trailing, afterwards)


class CallerMetadata:
    """The values of a caller's metadata; "" for a missing one. `error` says if a value is invalid.

    `traceparent` is None if the caller sent none or several, because none of several can be trusted.
    """

    def __init__(self) -> None:
        self.traceparent: str | None = None
        self.tenant = ""
        self.priority = ""
        self.control = ""
        self.authorization = ""
        self.credential = ""
        self.certificate = ""
        self.error: RingmeshError | None = None
        # Set by `identify`.
        self.identity: Identity | None = None


def caller_metadata(sent: Metadata) -> CallerMetadata:
    """Reads the caller's metadata. All code that needs its values calls this.

    A tenant or priority that is given twice is an error, and so is a tenant that `check_tenant` refuses. Several
    cache-control entries are joined by commas, as in HTTP.
    """
    values = CallerMetadata()
    traces = tenants = priorities = keys = 0
    for key, value in sent:
        if key == "traceparent":
            traces += 1
            values.traceparent = value if isinstance(value, str) and traces == 1 else None
        elif key == TENANT:
            tenants += 1
            values.tenant = _text(values, key, value, tenants)
            if values.tenant:
                try:
                    check_tenant(values.tenant, TENANT)
                except InvalidArgumentError as error:
                    values.error = error
        elif key == PRIORITY:
            priorities += 1
            values.priority = _text(values, key, value, priorities)
        elif key == AUTHORIZATION:
            keys += 1
            values.authorization = _text(values, key, value, keys)
        elif key == CREDENTIAL:
            values.credential = _text(values, key, value, 1)
        elif key == CLIENT_CERTIFICATE:
            values.certificate = _text(values, key, value, 1)
        elif key == CACHE_CONTROL:
            control = _text(values, key, value, 1)
            values.control = f"{values.control},{control}" if values.control else control
    return values


def identify(values: CallerMetadata, access: Access) -> None:
    """Establishes who calls: sets `identity` and takes the tenant from it. A refusal goes to `error`."""
    if not access.is_closed or values.error is not None:
        return
    try:
        values.identity = access.caller(values.authorization, values.credential, values.tenant, values.certificate)
    except RingmeshError as error:
        values.error = error
        return
    if values.identity is not None:
        values.tenant = values.identity.tenant


def of_tenant(data: bytes, tenant: str) -> bytes:
    """Returns a serialized request that says whose it is, for models that keep state; it replaces what a caller says.

    On the wire, the last entry of a map with the same key wins.
    """
    added = v2.ModelInferRequest()
    added.parameters[SEQUENCE_TENANT].string_param = tenant
    return data + added.SerializeToString()


def _text(values: CallerMetadata, key: str, value: str | bytes, times: int) -> str:
    """Returns the value; an error goes to `values.error`."""
    if times > 1:
        values.error = InvalidArgumentError(f"{key} is given twice", field=key)
    if isinstance(value, str):
        return value
    values.error = InvalidArgumentError(f"{key} is text", field=key)
    return ""


def check_tenant(tenant: str, field: str) -> None:
    """Raises InvalidArgumentError unless it has at most MAX_TENANT visible ASCII characters; spaces may be inside."""
    if len(tenant) > MAX_TENANT:
        raise InvalidArgumentError(f"{field} has {len(tenant)} characters; at most {MAX_TENANT}", field=field)
    if not (tenant.isascii() and tenant.isprintable()) or tenant != tenant.strip():
        raise InvalidArgumentError(
            f"{field} is {tenant!r}; a tenant has visible ASCII characters, and spaces only within", field=field
        )


def state_and_baggage(sent: Metadata) -> tuple[str, str]:
    """Returns the caller's W3C tracestate and baggage, which may come in several entries; "" for a missing one."""
    state, baggage = "", ""
    for key, value in sent:
        if key == "tracestate" and isinstance(value, str):
            state = f"{state},{value}" if state else value
        elif key == "baggage" and isinstance(value, str):
            baggage = f"{baggage},{value}" if baggage else value
    return state, baggage


def full_name(method: str) -> str:
    """Returns the method's name as in spans and OpenTelemetry: `package.Service/Method`."""
    return f"{_SERVICE}/{method}"


def span_attributes(method: str, code: int) -> dict[str, Value]:
    return rpc_attributes(full_name(method), code)


def deadline(context: Context) -> float | None:
    """Returns the caller's deadline in time.monotonic, or None if there is none."""
    # Without a deadline, it is None, contrary to grpcio's stubs.
    remaining: float | None = cast("Any", context).time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def sequence_of(request: v2.ModelInferRequest) -> int | str:
    """Returns the id of the request's sequence; 0 or "" if it belongs to none, which callers may also send."""
    if "sequence_id" not in request.parameters:
        return 0
    sequence = request.parameters["sequence_id"]
    return sequence.int64_param or sequence.string_param or sequence.uint64_param
