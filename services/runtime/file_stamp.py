"""Whether files have changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, ...], ...]


def stamp(paths: Iterable[Path]) -> Stamp:
    """Returns a value that differs after a file was replaced, written, removed or created."""
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
