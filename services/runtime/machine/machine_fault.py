"""Failures caused by the machine and not by the model: no descriptors, memory or disk space left."""

from __future__ import annotations

import errno
import os
import re

_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EIO, errno.ESTALE}
)
# Texts in messages of ONNX Runtime, CUDA and the C++ library; the first has an errno.
_NUMBER = re.compile(r"(?:system error number|errcode =|errno:?) ?(\d+)")
_MEMORY = re.compile(r"bad_alloc|out of memory|failed to allocate memory|cannot allocate memory", re.IGNORECASE)
_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")


def machine_fault(error: BaseException) -> str:
    """Returns the resource that the machine lacked, as text, if that caused `error`; otherwise ""."""
    cause: BaseException | None = error
    while cause is not None:
        if lacking := _lacking(cause):
            return lacking
        # `__context__` also after `from None`, which only hides it in tracebacks.
        cause = cause.__cause__ or cause.__context__
    return ""


def _lacking(error: BaseException) -> str:
    text = str(error)
    found = _NUMBER.search(text)
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found is not None else None
    if number in _ERRORS:
        return os.strerror(number)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return os.strerror(errno.ENOMEM)
    return "no thread can be started" if _THREADS.search(text) else ""
