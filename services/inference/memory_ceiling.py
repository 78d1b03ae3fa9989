"""A ceiling on what this process may allocate: what could never be served fails at once, and alone.

Linux grants more memory than there is, and kills who then uses it. A tensor larger than the container would end the
worker; refused, it ends the one request, by ONNX Runtime's own error. What is granted and does not fit beside the
rest still meets the kernel's OOM killer.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

import psutil

from services.inference import cgroups


def available(root: Path = Path("/")) -> int:
    """Bytes of the machine, or of this process's container where that has fewer."""
    limits = [psutil.virtual_memory().total]
    for folder in cgroups.folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return min(limits)


def lower(limit: int) -> None:
    """From now on this process may grow by `limit` bytes, at most."""
    status = Path("/proc/self/status").read_text()
    # What was reserved so far, stacks of threads above all, is mostly never touched.
    reserved = re.search(r"^VmData:\s+(\d+) kB", status, re.MULTILINE)
    ceiling = limit + (int(reserved[1]) << 10 if reserved else 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or ceiling < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))
