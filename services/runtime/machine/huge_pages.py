"""Moves memory onto huge pages: in a large cache on small pages, a look-up misses the TLB at each object it touches.

CPython allocates memory a megabyte at a time, too little for the kernel to use huge pages automatically. So fully used
regions are copied onto huge pages periodically (MADV_COLLAPSE, Linux 6.1), off the event loop: see docs/decisions/0030.
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
# Of the time: while a cache of large answers fills, each of its regions is copied once.
_MOST_BUSY = 0.02
# A region already on a huge page takes a microsecond, and needs no pause.
_NOTHING_SECONDS = 0.0002
# Resident pages below which a huge page would waste memory, for example on thread stacks.
_LEAST_RESIDENT = 500


async def keep_collapsing() -> None:
    """Collapses memory periodically until cancelled; returns immediately if the kernel does not support it."""
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
    """Collapses memory and returns the bytes on huge pages. Raises OSError if the system does not support it."""
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
        if (took := time.monotonic() - began) > _NOTHING_SECONDS:
            # Also so that page faults, which wait for a copy, find time between two.
            stopping.wait(took / _MOST_BUSY)
    return done


def _anonymous() -> Iterator[int]:
    """Yields the addresses in this process's anonymous memory that a huge page could start at."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield from range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE)
