"""Unexpected exceptions: the error for the caller, and rate-limited logging that one fault cannot flood."""

from __future__ import annotations

import logging
import time

from services.runtime.errors import InternalError, RingmeshError

# A repeated fault is logged with its stack at most once in this time.
_SECONDS = 10.0
_MOST_KINDS = 1000
# For each kind: when it may be logged again, and how many were suppressed since.
_kinds: dict[tuple[str, str, str], tuple[float, int]] = {}


def internal(log: logging.Logger, what: str, error: BaseException, trace_id: str = "") -> InternalError:
    """Returns the error for the caller: it names the kind of `error`, never its stack.

    `what` happened is logged with the stack, unless the same fault was logged within the last _SECONDS.
    """
    now = time.monotonic()
    kind = (what, type(error).__name__, _location(error))
    until, suppressed = _kinds.get(kind, (0.0, 0))
    if now < until:
        _kinds[kind] = (until, suppressed + 1)
    else:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[kind] = (now + _SECONDS, 0)
        more = f" ({suppressed} more like it since the last line)" if suppressed else ""
        log.error("%s%s%s", f"trace {trace_id}: " if trace_id else "", what, more, exc_info=error)
    return InternalError(f"internal error ({type(error).__name__}); the service's log has the cause")


def reported(log: logging.Logger, what: str, error: Exception, trace_id: str = "") -> RingmeshError:
    """Like `internal`, but a RingmeshError is returned unchanged and not logged."""
    return error if isinstance(error, RingmeshError) else internal(log, what, error, trace_id)


def _location(error: BaseException) -> str:
    """The file and line that raised `error`."""
    at = error.__traceback__
    if at is None:
        return ""
    while at.tb_next is not None:
        at = at.tb_next
    return f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
