"""Which malloc the process has, and how it treats large buffers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Unpacked there by scripts/install; otherwise that of the system: libtcmalloc-minimal4 on Debian, gperftools elsewhere.
_TCMALLOC = "libtcmalloc_minimal.so.4"
_PLACES = (f"{sys.prefix}/lib", *map(str, Path("/usr/lib").glob("*-linux-gnu*")), "/usr/lib64", "/usr/lib")
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def use_tcmalloc() -> None:
    """Begins this process anew with tcmalloc, where it is found; whoever preloads something else has that.

    Buffers are taken on one of the engine's threads and given back on another, and threads of glibc's malloc then wait
    for each other's locks: a fifth of a hit (docs/performance.md).
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
    request of 600 KB (docs/performance.md). tcmalloc keeps them by itself.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)
        mallopt(_M_TOP_PAD, 16 << 20)
