"""Which malloc the process has, how it treats large buffers, and that it gives back what nobody uses."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

# Unpacked there by scripts/install; otherwise that of the system: libtcmalloc-minimal4 on Debian, gperftools elsewhere.
_TCMALLOC = "libtcmalloc_minimal.so.4"
_PLACES = (f"{sys.prefix}/lib", *map(str, Path("/usr/lib").glob("*-linux-gnu*")), "/usr/lib64", "/usr/lib")
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# What a process keeps of memory that was free all through a round: that much is quickly used again.
KEPT_BYTES = 64 << 20
ROUND_SECONDS = 2.0
_LOOKS = 8
# malloc blocks other threads while it gives memory back.
_STEP_BYTES = 16 << 20
_PAUSE_SECONDS = 0.005


def use_tcmalloc() -> None:
    """Begins this process anew with tcmalloc, where it is found; whoever preloads something else has that.

    Buffers are taken on one of the engine's threads and given back on another, and threads of glibc's malloc then wait
    for each other's locks: a fifth of a hit (docs/decisions/0030).
    """
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        return
    for place in _PLACES:
        library = Path(place, _TCMALLOC)
        if library.exists():
            os.environ["LD_PRELOAD"] = str(library)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def has_tcmalloc() -> bool:
    """Whether this process has it."""
    return "libtcmalloc" in os.environ.get("LD_PRELOAD", "")


def keep_large_buffers() -> None:
    """Freed buffers of up to 32 MB stay with the process, at most 128 MB in all, ready for the next request.

    Otherwise glibc maps each, has it faulted in page by page and unmaps it again, which takes longer than to serve a
    request of 600 KB (docs/decisions/0030). tcmalloc keeps them by itself.
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
        """What nobody uses and the process has not given back."""

    def give_back(self, size: int) -> None:
        """At least `size` bytes of it; later calls give back less if it was more."""


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
        # glibc counts pages that it has given back as free.
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
    """That of this process; None where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "MallocExtension_ReleaseToSystem"):
        return _TcMalloc(library)
    return _Glibc(library) if hasattr(library, "mallinfo2") else None


async def keep_giving_back(shrink: Callable[[], object] = lambda: None, held: Malloc | None = None) -> None:
    """Until cancelled: gives back memory that nobody used for a round, but for KEPT_BYTES.

    `shrink` is called on a thread before, for what gives memory back to malloc.
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
