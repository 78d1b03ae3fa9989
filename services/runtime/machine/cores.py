"""The number of cores this process may use, by affinity and the CPU quota of its cgroup (a container's limit)."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Returns whole cores, at least 1. A quota of 1.5 counts as 2: occasional throttling is better than idle cores."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(ours, _quota(root))))


def _quota(root: Path) -> float:
    """Returns the lowest quota, in cores, of the process's cgroup and those above it; inf if there is none.

    Source: Linux admin-guide/cgroup-v2.rst, "CPU Interface Files"; v1 in scheduler/sched-bwc.rst.
    """
    quotas = [math.inf]
    for folder in _cgroups(root):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # the root cgroup has no quota, and a file may be unreadable
            continue
    return min(quotas)


def _cgroups(root: Path) -> list[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        # Inside a container the path may be the host's; the cgroup is the mount itself then.
        found += [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]
    return found
