"""The errors that callers see.

RingmeshError
├── InvalidArgumentError     the request is invalid, on any server
├── NotFoundError            no such model or version
├── AlreadyExistsError       the name is taken
├── UnauthenticatedError     the caller's key, certificate or token is missing, unknown or expired
├── PermissionDeniedError    the caller may not do this
├── FailedPreconditionError  this server lacks state that the request needs; another may have it
├── ResourceExhaustedError   a limit is reached; may be retried later
├── UnavailableError         no server can answer now; may be retried elsewhere
├── DeadlineExceededError    the caller's deadline passed
├── UnimplementedError       valid, but not supported here
└── InternalError            a fault of the server

The cores raise these. `rpc.py` turns them into gRPC statuses. An envelope carries them as `Failure` between worker
and router.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

import grpc
from ringmesh.inference.v1 import inference_pb2

# By number, as in a google.rpc.Status.
CODE_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}
_LONGEST_BYTES = 1000
_MOST_NAMES = 20


class RingmeshError(Exception):
    """A failed call: a status, a message, and the request field at fault (or "")."""

    code: ClassVar[grpc.StatusCode]
    # The cause in one word, finer than the code: metrics, spans and logs distinguish errors by it.
    kind: str
    # Digest of the model version that refused the request on a worker; b"": none did.
    model_digest = b""
    # Seconds after which a retry may succeed; None: unknown.
    retry_after: float | None = None

    def __init__(self, message: str, *, field: str = "", kind: str = "") -> None:
        message = _clipped(message)
        super().__init__(message)
        self.message = message
        self.field = field
        if kind:
            self.kind = kind

    def within(self, what: str) -> Self:
        """Returns this error as one of `what`. A copy: others may be told of this one, or it may be cached."""
        message = _clipped(f"{what}: {self.message}")
        error = type(self).__new__(type(self), message)  # subclasses have other arguments
        for name, value in self.__dict__.items():  # a compiled class has no __dict__ before its first attribute
            setattr(error, name, value)
        error.message = message
        return error

    def to_failure(self) -> inference_pb2.Failure:
        return inference_pb2.Failure(code=self.code.value[0], message=self.message, field=self.field, kind=self.kind)


def _clipped(message: str) -> str:
    """Shortens `message`: metadata carries it three times, and clients refuse responses with over 8 KB of metadata."""
    data = message.encode(errors="replace")
    if len(data) <= _LONGEST_BYTES:
        return message
    return f"{data[:_LONGEST_BYTES].decode(errors='ignore')}…"


def some(names: Iterable[str]) -> str:
    """Text for a message: the first of `names`, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more


class InvalidArgumentError(RingmeshError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    kind = "invalid_input"


class NotFoundError(RingmeshError):
    code = grpc.StatusCode.NOT_FOUND
    kind = "unknown_model"


class AlreadyExistsError(RingmeshError):
    code = grpc.StatusCode.ALREADY_EXISTS
    kind = "conflict"


class UnauthenticatedError(RingmeshError):
    """The caller's key, certificate or token is missing, unknown or expired."""

    code = grpc.StatusCode.UNAUTHENTICATED
    kind = "unauthenticated"


class PermissionDeniedError(RingmeshError):
    code = grpc.StatusCode.PERMISSION_DENIED
    kind = "denied"


class FailedPreconditionError(RingmeshError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    kind = "precondition"


class ResourceExhaustedError(RingmeshError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    kind = "overload"
    retry_after: float | None = 0.1


class UnavailableError(RingmeshError):
    code = grpc.StatusCode.UNAVAILABLE
    kind = "unavailable"


class DeadlineExceededError(RingmeshError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    kind = "deadline"


class UnimplementedError(RingmeshError):
    code = grpc.StatusCode.UNIMPLEMENTED
    kind = "unimplemented"


class InternalError(RingmeshError):
    code = grpc.StatusCode.INTERNAL
    kind = "internal"


def kind_of(error: Exception) -> str:
    """Returns the kind of `error`; an exception outside this tree has the kind of InternalError."""
    return error.kind if isinstance(error, RingmeshError) else InternalError.kind


_BY_CODE: dict[int, type[RingmeshError]] = {kind.code.value[0]: kind for kind in RingmeshError.__subclasses__()}


def from_status(code: grpc.StatusCode, message: str) -> RingmeshError:
    """Returns the error for a status that another Ringmesh server answered."""
    return _BY_CODE.get(code.value[0], InternalError)(message)


def from_failure(failure: inference_pb2.Failure) -> RingmeshError:
    """Returns the error that `to_failure` packed; an unknown code becomes InternalError."""
    return _BY_CODE.get(failure.code, InternalError)(failure.message, field=failure.field, kind=failure.kind)
