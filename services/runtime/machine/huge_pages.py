"""Memory on huge pages: where a large cache lies, a look-up misses the TLB at each object it touches.

CPython asks for its memory a megabyte at a time, too little for the kernel to give huge pages by itself. What is in
full use is copied onto them now and then (MADV_COLLAPSE, Linux 6.1), off the event loop: see docs/decisions/0030.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_HUGE = 2 << 20
_PAGE = 4096
_MADV_COLLAPSE = 25
_ROUND_SECONDS = 10.0
# Each copy holds up page faults for about as long as this pause.
_PAUSE_SECONDS = 0.002
# Below, it would take memory that nobody uses: thread stacks, for one.
_LEAST_RESIDENT = 500


async def keep_collapsing() -> None:
    """Until cancelled; returns at once where the kernel cannot."""
    stopping = threading.Event()
    try:
        while True:
            await asyncio.to_thread(collapse, stopping)
            await asyncio.sleep(_ROUND_SECONDS)
    except OSError as error:
        log.debug("memory stays on small pages: %s", error)
    finally:
        stopping.set()


def collapse(stopping: threading.Event) -> int:
    """How many bytes are on huge pages after it. Raises OSError where the system knows no such thing."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = (ctypes.c_ubyte * (_HUGE // _PAGE))()
    done = 0
    for start in _anonymous():
        if stopping.is_set():
            break
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(_HUGE)
        if libc.mincore(address, size, resident) or sum(resident) < _LEAST_RESIDENT:
            continue
        began = time.monotonic()
        if libc.madvise(address, size, _MADV_COLLAPSE) == 0:
            done += _HUGE
        # What lies on huge pages already takes a microsecond.
        if time.monotonic() - began > _PAUSE_SECONDS / 10:
            stopping.wait(_PAUSE_SECONDS)
    return done


def _anonymous() -> Iterator[int]:
    """Where huge pages could lie in this process's own memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield from range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE)
