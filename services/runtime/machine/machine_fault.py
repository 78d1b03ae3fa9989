"""Failures that say something of the machine and nothing of the model: no descriptors, memory or room left."""

from __future__ import annotations

import errno
import os
import re

_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EIO, errno.ESTALE}
)
# What ONNX Runtime, CUDA and the C++ library say in their messages, the first with an errno.
_NUMBER = re.compile(r"(?:system error number|errcode =|errno:?) ?(\d+)")
_MEMORY = re.compile(r"bad_alloc|out of memory|failed to allocate memory|cannot allocate memory", re.IGNORECASE)
_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")


def machine_fault(error: BaseException) -> str:
    """What the machine lacked, in words, where that is why `error` was raised; "" where it is not."""
    cause: BaseException | None = error
    while cause is not None:
        if told := _told(cause):
            return told
        # Also where it was raised `from None`, which only hides it in tracebacks.
        cause = cause.__cause__ or cause.__context__
    return ""


def _told(error: BaseException) -> str:
    text = str(error)
    found = _NUMBER.search(text)
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found is not None else None
    if number in _ERRORS:
        return os.strerror(number)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return os.strerror(errno.ENOMEM)
    return "no thread can be started" if _THREADS.search(text) else ""
