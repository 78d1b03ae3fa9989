"""The control groups of this process: where a container's limits stand."""

from __future__ import annotations

from pathlib import Path


def folders(root: Path, controller: str) -> list[Path]:
    """That of the process and those above it, each with limits of its own; [] where there are none.

    Source: Linux admin-guide/cgroup-v2.rst, and cgroup-v1/ beside it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = mount / path.lstrip("/")
        # Inside a container the path may be the host's: then the mount itself is its cgroup.
        found += [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]
    return found
