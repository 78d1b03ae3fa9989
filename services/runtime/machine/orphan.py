"""Ends child processes when their parent ends for any reason."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Loaded here, because after a fork the locks of other threads can stay held forever.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Returns a function to run between fork and exec, so that the kernel sends the child `number` if the parent ends.

    The kernel watches the thread that forks, so fork from a thread that lives as long as the process. A child that
    changes its user must do so before, since that clears the setting. Returns None if the operating system has no such
    feature.
    """
    if _LIBC is None:
        return None
    libc, parent = _LIBC, os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        # The parent can have ended before the call took effect.
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel
