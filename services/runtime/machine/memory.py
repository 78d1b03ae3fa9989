"""The process's malloc: which one is used, how it treats large buffers, and returning unused memory to the system."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Protocol

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# Memory a process keeps even if it was free for a whole round: this much is soon used again.
KEPT_BYTES = 64 << 20
ROUND_SECONDS = 2.0
_LOOKS = 8
# Memory is returned in steps, because malloc blocks other threads meanwhile.
_STEP_BYTES = 16 << 20
_PAUSE_SECONDS = 0.005


def has_tcmalloc() -> bool:
    return "libtcmalloc" in os.environ.get("LD_PRELOAD", "")


def keep_large_buffers() -> None:
    """Makes glibc keep freed buffers of up to 32 MB, at most 128 MB in all, for the next request.

    Otherwise glibc maps each buffer, faults it in page by page and unmaps it again. That takes longer than serving a
    request of 600 KB (docs/decisions/0030). tcmalloc keeps buffers automatically.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)
        mallopt(_M_TOP_PAD, 16 << 20)


class Malloc(Protocol):
    """The memory that a malloc holds."""

    def free_bytes(self) -> int:
        """Returns the bytes that are unused and not yet returned to the system."""

    def give_back(self, size: int) -> None:
        """Returns at least `size` bytes to the system; if it returns more, later calls return less."""


class _TcMalloc:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._property = library.MallocExtension_GetNumericProperty
        self._property.argtypes = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t))
        self._release = library.MallocExtension_ReleaseToSystem
        self._release.argtypes, self._release.restype = (ctypes.c_size_t,), None

    def free_bytes(self) -> int:
        size = ctypes.c_size_t()
        self._property(b"tcmalloc.pageheap_free_bytes", ctypes.byref(size))
        return size.value

    def give_back(self, size: int) -> None:
        self._release(size)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


class _Glibc:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._info = library.mallinfo2
        self._info.restype = _Mallinfo2
        self._trim = library.malloc_trim
        self._trim.argtypes = (ctypes.c_size_t,)
        # glibc still counts pages that it has returned as free.
        self._given_back = 0

    def free_bytes(self) -> int:
        free: int = self._info().fordblks
        self._given_back = min(self._given_back, free)
        return free - self._given_back

    def give_back(self, size: int) -> None:
        if self.free_bytes():
            self._trim(0)
            self._given_back = self._info().fordblks


def malloc() -> Malloc | None:
    """Returns the malloc of this process, or None if it has no statistics."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "MallocExtension_ReleaseToSystem"):
        return _TcMalloc(library)
    return _Glibc(library) if hasattr(library, "mallinfo2") else None


async def keep_giving_back(shrink: Callable[[], object] = lambda: None, held: Malloc | None = None) -> None:
    """Returns memory that was unused for a whole round to the system, except KEPT_BYTES; runs until cancelled.

    Before that, `shrink` is called on a thread, to free memory to malloc.
    """
    held = held or malloc()
    if held is None:
        return
    while True:
        free = held.free_bytes()
        for _ in range(_LOOKS):
            await asyncio.sleep(ROUND_SECONDS / _LOOKS)
            free = min(free, held.free_bytes())
        await asyncio.to_thread(shrink)
        for start in range(KEPT_BYTES, free, _STEP_BYTES):
            await asyncio.to_thread(held.give_back, min(_STEP_BYTES, free - start))
            await asyncio.sleep(_PAUSE_SECONDS)
