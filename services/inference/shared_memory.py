"""System shared memory: tensors that callers on this host leave and find in POSIX shared memory objects."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from services.inference.repository import is_file_name
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError

_FOLDER = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies on Linux


@dataclass(frozen=True, slots=True)
class Region:
    """`byte_size` bytes from `offset` on of the object `key`, as registered."""

    name: str
    key: str
    offset: int
    byte_size: int
    memory: mmap.mmap


class SharedMemory:
    """The regions that callers registered, by name."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises AlreadyExistsError, NotFoundError, and InvalidArgumentError where the object is smaller."""
        if not name or "\0" in name:
            raise InvalidArgumentError("a region needs a name, without NUL", field="name")
        if name in self._regions:
            raise AlreadyExistsError(
                f"shared memory region {name!r} is registered already; unregister it first", field="name"
            )
        file = key.removeprefix("/")
        if not is_file_name(file):
            raise InvalidArgumentError(f"{key!r} is no key of a POSIX shared memory object, such as /name", field="key")
        try:
            descriptor = os.open(_FOLDER / file, os.O_RDWR)
        except OSError as error:
            raise NotFoundError(
                f"cannot open the shared memory object {key!r}: {error.strerror}", field="key"
            ) from None
        try:
            size = os.fstat(descriptor).st_size
            if byte_size == 0 or offset + byte_size > size:
                raise InvalidArgumentError(
                    f"region {name!r} would end at byte {offset + byte_size} of {key!r}, which has {size}",
                    field="byte_size",
                )
            memory = mmap.mmap(descriptor, offset + byte_size)  # from 0: a mapping begins at a page
        finally:
            os.close(descriptor)
        self._regions[name] = Region(name, key, offset, byte_size, memory)

    def unregister(self, name: str) -> None:
        """Forgets a region, or all where the name is ""; what is under way keeps its memory. Unknown names pass."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str) -> list[Region]:
        """The region of that name, or all where it is "". Raises NotFoundError."""
        return list(self._regions.values()) if not name else [self._find(name, "name")]

    def view(self, name: str, offset: int, byte_size: int, field: str) -> memoryview:
        """A writable part of a region, no copy. Raises NotFoundError, InvalidArgumentError beyond its end."""
        region = self._find(name, field)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise InvalidArgumentError(
                f"bytes {offset} to {offset + byte_size} are not in shared memory region {name!r}, "
                f"which has {region.byte_size}",
                field=field,
            )
        start = region.offset + offset
        return memoryview(region.memory)[start : start + byte_size]

    def _find(self, name: str, field: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            known = ", ".join(self._regions) or "none"
            raise NotFoundError(f"no shared memory region {name!r}; registered are: {known}", field=field)
        return region
