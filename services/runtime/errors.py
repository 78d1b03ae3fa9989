"""What can go wrong, as the caller sees it.

RingmeshError
├── InvalidArgumentError     the request is wrong, and would be wrong anywhere
├── NotFoundError            no such model or version
├── AlreadyExistsError       the name is taken
├── FailedPreconditionError  what the request builds on is not here; it may be elsewhere
├── ResourceExhaustedError   too much now; may be retried later
├── UnavailableError         nobody can answer now; may be retried elsewhere
├── DeadlineExceededError    the caller's time is up
├── UnimplementedError       understood, but not served here
└── InternalError            our fault

The cores raise these; `rpc.py` turns them into gRPC statuses, and an envelope carries them as
`Failure` between worker and router.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import grpc
from ringmesh.inference.v1 import inference_pb2

_LONGEST_BYTES = 1000
_MOST_NAMES = 20


class RingmeshError(Exception):
    """An answer that is not the one asked for: a status, a message, and the request field at fault (or "")."""

    code: ClassVar[grpc.StatusCode]
    # What went wrong, in a word, finer than the code: metrics, spans and logs tell errors apart by it.
    kind: str
    # When a retry may do better, in seconds from now; None: nobody knows.
    retry_after: float | None = None

    def __init__(self, message: str, *, field: str = "", kind: str = "") -> None:
        message = _clipped(message)
        super().__init__(message)
        self.message = message
        self.field = field
        if kind:
            self.kind = kind

    def to_failure(self) -> inference_pb2.Failure:
        """The error as an envelope carries it."""
        return inference_pb2.Failure(code=self.code.value[0], message=self.message, field=self.field, kind=self.kind)


def _clipped(message: str) -> str:
    """It travels in metadata, three times over: clients refuse an answer with more than 8 KB of that."""
    data = message.encode(errors="replace")
    if len(data) <= _LONGEST_BYTES:
        return message
    return f"{data[:_LONGEST_BYTES].decode(errors='ignore')}…"


def some(names: Iterable[str]) -> str:
    """The first of `names`, for a message, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more


class InvalidArgumentError(RingmeshError):
    """The request is wrong, and would be wrong anywhere."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    kind = "invalid_input"


class NotFoundError(RingmeshError):
    """There is no such model, or no such version of it."""

    code = grpc.StatusCode.NOT_FOUND
    kind = "unknown_model"


class AlreadyExistsError(RingmeshError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS
    kind = "conflict"


class FailedPreconditionError(RingmeshError):
    """What the request builds on is not here; it may be elsewhere."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    kind = "precondition"


class ResourceExhaustedError(RingmeshError):
    """Too much now; the caller may retry after `retry_after` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    kind = "overload"
    retry_after: float | None = 0.1


class UnavailableError(RingmeshError):
    """Nobody can answer now; the caller may retry elsewhere."""

    code = grpc.StatusCode.UNAVAILABLE
    kind = "unavailable"


class DeadlineExceededError(RingmeshError):
    """The caller's time is up."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    kind = "deadline"


class UnimplementedError(RingmeshError):
    """Understood, but not served here."""

    code = grpc.StatusCode.UNIMPLEMENTED
    kind = "unimplemented"


class InternalError(RingmeshError):
    """Our fault; the service's log has the cause."""

    code = grpc.StatusCode.INTERNAL
    kind = "internal"


def kind_of(error: Exception) -> str:
    """Its kind; that of InternalError where nobody foresaw it."""
    return error.kind if isinstance(error, RingmeshError) else InternalError.kind


_BY_CODE: dict[int, type[RingmeshError]] = {kind.code.value[0]: kind for kind in RingmeshError.__subclasses__()}


def from_status(code: grpc.StatusCode, message: str) -> RingmeshError:
    """The error of a status that another server of ours answered."""
    return _BY_CODE.get(code.value[0], InternalError)(message)


def from_failure(failure: inference_pb2.Failure) -> RingmeshError:
    """The error that `to_failure` packed; a code unknown here becomes InternalError."""
    return _BY_CODE.get(failure.code, InternalError)(failure.message, field=failure.field, kind=failure.kind)
