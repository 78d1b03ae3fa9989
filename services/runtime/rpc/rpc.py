"""The boundary between Ringmesh and gRPC: converts bytes to messages and errors to statuses."""

from __future__ import annotations  # compiled by mypyc

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from services.runtime import faults
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError, RingmeshError
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.request_limits import check_size
from services.runtime.rpc import client_certificate
from services.runtime.rpc.client_certificate import CLIENT_CERTIFICATE

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Request = TypeVar("Request", bound=Message)


class Answer:
    """A serialized response and its trailing metadata.

    `afterwards` is called on the event loop, whether the answer was sent or not. `pieces` follow `body`: a large
    response stays in pieces until it is sent; who needs it whole joins them on a thread.
    """

    def __init__(
        self,
        body: bytes,
        trailing: Metadata,
        afterwards: Callable[[], None] | None = None,
        pieces: Sequence[bytes] = (),
    ) -> None:
        self.body = body
        self.trailing = trailing
        self.afterwards = afterwards
        self.pieces = pieces

    @property
    def is_large(self) -> bool:
        """Whether it takes long to copy."""
        return len(self.body) > LARGE_BYTES or len(self.pieces) > 0

    def whole(self) -> bytes:
        """Returns the response in one piece; call it on a thread if `is_large`."""
        return b"".join((self.body, *self.pieces)) if self.pieces else self.body


class Failure:
    """The error status and trailing metadata that a call ends with; `afterwards` is as for Answer."""

    def __init__(
        self, code: grpc.StatusCode, message: str, trailing: Metadata, afterwards: Callable[[], None] | None = None
    ) -> None:
        self.code = code
        self.message = message
        self.trailing = trailing
        self.afterwards = afterwards


# Limit for one request: names and values, and 32 bytes for each entry, as in RFC 9113.
MAX_METADATA_BYTES = 16 << 10
# Trailer with the milliseconds after which a client with a retry policy retries (gRFC A6).
PUSHBACK = "grpc-retry-pushback-ms"


# A unary method that needs no asyncio task. It takes the request, its metadata and the caller's deadline
# (time.monotonic). It must await driver.ON_LOOP before it awaits anything else: what ends before that is answered at
# once, and needs no driver. It is cancelled when the caller leaves, and at the deadline.
FastPath: TypeAlias = Callable[[bytes, Metadata, float | None], Coroutine[Any, Any, "Answer | Failure"]]


@dataclass(frozen=True, slots=True)
class Service:
    """A gRPC service: its handlers by method name, and the fast paths that an engine may use instead."""

    descriptor: ServiceDescriptor
    handlers: Mapping[str, Handler]
    fast_paths: Mapping[str, FastPath] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.descriptor.full_name


def parse(request_type: type[Request], data: bytes) -> Request:
    """Parses a message. Raises InvalidArgumentError if `data` is not a serialized `request_type`."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        raise InvalidArgumentError(f"the {len(data)} bytes received are not a serialized {name}") from None


def check_metadata(metadata: Metadata) -> None:
    size = 0
    for name, value in metadata:
        size += len(name) + len(value) + 32
    if size > MAX_METADATA_BYTES:
        error = ResourceExhaustedError(
            f"the request's metadata has {size} bytes, counting names, values and 32 for each; "
            f"{MAX_METADATA_BYTES} are taken",
            kind="too_large",
        )
        error.retry_after = None
        raise error


def unary(
    request_type: type[Request],
    handle: Callable[[Request, Context], Awaitable[Message]],
    check: Callable[[bytes], None] = check_size,
) -> Handler:
    """Returns a unary-unary handler around `handle`, which takes and returns a message and may raise RingmeshError.

    `check` raises RingmeshError for bytes that would take long to parse.
    """

    async def call(data: bytes, context: Context) -> bytes:
        try:
            check(data)
            response = await handle(parse(request_type, data), context)
            return response.SerializeToString()
        except Exception as error:
            await abort(context, faults.reported(log, f"{request_type.DESCRIPTOR.full_name} failed", error))

    return grpc.unary_unary_rpc_method_handler(call)


def metadata(context: Context) -> Metadata:
    """The metadata of a call. On a server that ends TLS itself, the names in the client's certificate are there as from
    a TLS edge, and never what the client sent under that name."""
    sent: Metadata = tuple(context.invocation_metadata() or ())
    peer = context.auth_context()
    if peer.get("transport_security_type") != [b"ssl"]:
        return sent
    names = [name.decode() for name in peer.get("x509_subject_alternative_name", ())]
    own = ((CLIENT_CERTIFICATE, client_certificate.header(names)),) if names else ()
    return (*[entry for entry in sent if entry[0] != CLIENT_CERTIFICATE], *own)


async def abort(context: Context, error: RingmeshError, trailing: Metadata = ()) -> NoReturn:
    """Ends the call with the error's status; `grpc-status-details-bin` has the details as google.rpc messages."""
    await context.abort(error.code, error.message, (*trailing, *status_details(error)))


def failure(error: RingmeshError, trailing: Metadata = (), afterwards: Callable[[], None] | None = None) -> Failure:
    """Like `abort`, for a fast path: returns the failure."""
    return Failure(error.code, error.message, (*trailing, *status_details(error)), afterwards)


def refused_field(error: grpc.aio.AioRpcError) -> str:
    """The field that the server's `status_details` say is at fault; "" if they name none."""
    status, violated = status_pb2.Status(), error_details_pb2.BadRequest()
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            with suppress(DecodeError):
                status.ParseFromString(value)
    for detail in status.details:
        if detail.Unpack(violated):
            return "".join(violation.field for violation in violated.field_violations[:1])
    return ""


def status_details(error: RingmeshError) -> Metadata:
    """Returns trailing metadata with google.rpc details: BadRequest if a field is at fault, RetryInfo for a retry.

    The retry delay is also sent as PUSHBACK, which gRPC clients with a retry policy follow.
    """
    if not error.field and error.retry_after is None:
        return ()
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is None:
        return (("grpc-status-details-bin", status.SerializeToString()),)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMicroseconds(int(error.retry_after * 1e6))
    status.details.add().Pack(retry)
    return (
        ("grpc-status-details-bin", status.SerializeToString()),
        (PUSHBACK, str(math.ceil(error.retry_after * 1e3))),
    )
