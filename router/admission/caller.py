"""Who asks, and how much it matters: what admission goes by."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from services.runtime import protocol
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.rpc import Metadata

PRIORITY = "ringmesh-priority"


class Priority(Enum):
    """The part of a limit that a request may fill: under overload, the smallest part is refused first."""

    SHEDDABLE = 0.5
    NORMAL = 1.0
    CRITICAL = 1.5


class Caller(NamedTuple):
    """The tenant, "" where it is not told, and the priority of its request."""

    tenant: str
    priority: Priority


ANYBODY = Caller("", Priority.NORMAL)
# Work of the router's own: refused first where there is overload, and on no tenant's quota.
ROUTER = Caller("", Priority.SHEDDABLE)
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}


class RefusedError(ResourceExhaustedError):
    """Not admitted. It holds for `caller`, and says nothing of others who ask for the same."""

    def __init__(self, message: str, caller: Caller, *, retry_after: float, kind: str = "") -> None:
        super().__init__(message, kind=kind)
        self.caller = caller
        self.retry_after = retry_after


def caller_of(metadata: Metadata) -> Caller:
    """From `ringmesh-tenant` and `ringmesh-priority`. Raises InvalidArgumentError for an unknown priority."""
    for key, value in metadata:
        if key == PRIORITY:
            priority = _PRIORITIES.get(str(value))
            if priority is None:
                raise InvalidArgumentError(
                    f"{PRIORITY} is one of {', '.join(_PRIORITIES)}, not {value!r}", field=PRIORITY
                )
            return Caller(protocol.tenant(metadata), priority)
    return Caller(protocol.tenant(metadata), Priority.NORMAL)
