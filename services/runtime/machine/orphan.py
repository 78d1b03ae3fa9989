"""Children that end when their parent does, however it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Loaded here and not after the fork, where another thread's locks may be held for ever.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """What a child runs between fork and exec so that the kernel sends it `number` when this process is gone.

    The kernel means the thread that forked: call it from one that lives as long as the process. It forgets the wish
    when the child changes its user, so that comes first. None where the system has nothing like it.
    """
    if _LIBC is None:
        return None
    libc, parent = _LIBC, os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        # The parent may have died before the line above took effect.
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel
