"""The caller of a request: its tenant and priority, on which admission decides."""

from __future__ import annotations  # compiled by mypyc

from enum import Enum
from typing import NamedTuple

from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.oip.protocol import PRIORITY, CallerMetadata


class Priority(Enum):
    """The multiple of a limit up to which a request is admitted: under overload, the lowest is refused first."""

    SHEDDABLE = 0.5
    NORMAL = 1.0
    CRITICAL = 1.5


class Caller(NamedTuple):
    """The tenant ("" if not given) and the priority of the request."""

    tenant: str
    priority: Priority


ANYBODY = Caller("", Priority.NORMAL)
# The router's own work: refused first under overload, and counted against no tenant's quota.
ROUTER = Caller("", Priority.SHEDDABLE)
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}


class RefusedError(ResourceExhaustedError):
    """The request was not admitted. This applies to `caller` only, not to others with the same request."""

    def __init__(self, message: str, caller: Caller, *, retry_after: float, kind: str = "") -> None:
        super().__init__(message, kind=kind)
        self.caller = caller
        self.retry_after = retry_after


def caller_of(sent: CallerMetadata) -> Caller:
    """The caller named in the metadata. Raises InvalidArgumentError for an unknown priority, or raises `sent.error`."""
    if sent.error is not None:
        raise sent.error
    if not sent.tenant and not sent.priority:
        return ANYBODY
    priority = _PRIORITIES.get(sent.priority or Priority.NORMAL.name.lower())
    if priority is None:
        raise InvalidArgumentError(
            f"{PRIORITY} is one of {', '.join(_PRIORITIES)}, not {sent.priority!r}", field=PRIORITY
        )
    return Caller(sent.tenant, priority)
