"""Who asks, and how much it matters: what admission goes by."""

from __future__ import annotations  # compiled by mypyc

from enum import Enum
from typing import NamedTuple

from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.oip.protocol import PRIORITY, Told


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


def caller_of(told: Told) -> Caller:
    """The caller that `told` names. Raises InvalidArgumentError for an unknown priority, or with `told.error`."""
    if told.error is not None:
        raise told.error
    if not told.tenant and not told.priority:
        return ANYBODY
    priority = _PRIORITIES.get(told.priority or Priority.NORMAL.name.lower())
    if priority is None:
        raise InvalidArgumentError(
            f"{PRIORITY} is one of {', '.join(_PRIORITIES)}, not {told.priority!r}", field=PRIORITY
        )
    return Caller(told.tenant, priority)
