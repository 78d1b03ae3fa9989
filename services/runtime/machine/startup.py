"""What a process of a service does first. This module imports little, because a restart imports it twice."""

from __future__ import annotations

import atexit
import gc
import os
import sys

# scripts/install unpacks it into sys.prefix; otherwise the system's is used: libtcmalloc-minimal4 on Debian, gperftools
# elsewhere.
_TCMALLOC = "libtcmalloc_minimal.so.4"


def begin() -> None:
    """Makes the start and the end of this process short; imports are most of its start."""
    # A full garbage collection visits every cached entry: 100,000 entries stalled requests for 80 ms
    # (docs/decisions/0030). With Python's thresholds, collections while modules are imported take a tenth of a start.
    gc.set_threshold(20_000, 50, 10_000)
    # Otherwise pydantic reads the metadata of all packages that are installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Otherwise Python collects all that is left, several times, before it ends.
    atexit.register(gc.freeze)


def use_tcmalloc() -> None:
    """Restarts this process with tcmalloc if it is installed, unless LD_PRELOAD is set already.

    What one thread allocates, another frees. With glibc's malloc, threads then wait for each other's locks
    (docs/decisions/0022).
    """
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        return
    names = os.listdir("/usr/lib") if os.path.isdir("/usr/lib") else []  # noqa: PTH112, PTH208
    of_debian = [f"/usr/lib/{name}" for name in names if "-linux-gnu" in name]
    for folder in (f"{sys.prefix}/lib", *of_debian, "/usr/lib64", "/usr/lib"):
        library = f"{folder}/{_TCMALLOC}"
        if os.path.exists(library):  # noqa: PTH110
            os.environ["LD_PRELOAD"] = library
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
