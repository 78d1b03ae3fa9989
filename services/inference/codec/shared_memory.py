"""System shared memory: callers on this host pass tensors in POSIX shared memory objects.

Objects are read and written as files and never mapped. Their owner may truncate one at any time, and a process that
then touches the mapping is killed by SIGBUS, even if it checked the size before. The copy costs as much as the copy of
a request body.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.inference.repository.repository import is_file_name
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from services.runtime.machine.machine_fault import machine_fault

_FOLDER = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies on Linux
# Each region holds a file descriptor.
MAX_REGIONS = 1024
# Limit for the inputs of one request in shared memory, which are copied.
MAX_REQUEST_BYTES = 1 << 30
_LONGEST_NAME = 255
# The kernel copies without the GIL. Signals are handled between two slices.
_SLICE = 16 << 20


class _Object:
    """An open shared memory object; closed when neither a region nor a request uses it any more."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Region:
    """A registered region: `byte_size` bytes of the object `key`, from `offset` on."""

    name: str
    key: str
    offset: int
    byte_size: int
    object: _Object

    def read(self, offset: int, byte_size: int, field: str) -> npt.NDArray[np.uint8]:
        """A copy of a part of the region. Raises InvalidArgumentError if the part does not exist (any more)."""
        self.check(offset, byte_size, field)
        data = np.empty(byte_size, np.uint8)
        done = 0
        while done < byte_size:
            part: Any = data[done : done + _SLICE]
            count = os.preadv(self.object.descriptor, [part], self.offset + offset + done)
            if not count:
                raise self._gone(offset, byte_size, field)
            done += count
        return data

    def write(self, offset: int, data: bytes | npt.NDArray[np.uint8], field: str) -> None:
        """Writes a part of the region. Raises InvalidArgumentError if the part does not exist (any more), and
        ResourceExhaustedError if there is no room."""
        self.check(offset, len(data), field)
        view: Any = memoryview(data)  # type: ignore[arg-type]
        start = self.offset + offset
        # A write beyond the end would make the object larger again.
        if os.fstat(self.object.descriptor).st_size < start + len(data):
            raise self._gone(offset, len(data), field)
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.object.descriptor, view[done : done + _SLICE], start + done)
            except OSError as error:
                raise ResourceExhaustedError(
                    f"shared memory region {self.name!r} cannot be written: {error.strerror}", field=field
                ) from None

    def check(self, offset: int, byte_size: int, field: str) -> None:
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise InvalidArgumentError(
                f"bytes {offset} to {offset + byte_size} are not in shared memory region {self.name!r}, "
                f"which has {self.byte_size}",
                field=field,
            )

    def _gone(self, offset: int, byte_size: int, field: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"bytes {offset} to {offset + byte_size} of shared memory region {self.name!r} are no longer there: "
            f"{self.key!r} was truncated to {os.fstat(self.object.descriptor).st_size} bytes, and the region lies at "
            f"{self.offset} to {self.offset + self.byte_size}",
            field=field,
        )


class SharedMemory:
    """The regions that callers registered, by name; at most MAX_REGIONS.

    The names of their objects begin with `prefix`, so that callers cannot reach other objects of this worker's user.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Registers a region.

        Raises AlreadyExistsError, NotFoundError, InvalidArgumentError if the object is smaller, and
        ResourceExhaustedError if MAX_REGIONS are registered.
        """
        if not 0 < len(name) <= _LONGEST_NAME or "\0" in name:
            raise InvalidArgumentError(
                f"a region needs a name of up to {_LONGEST_NAME} characters, without NUL", field="name"
            )
        if name in self._regions:
            raise AlreadyExistsError(
                f"shared memory region {name!r} is registered already; unregister it first", field="name"
            )
        if len(self._regions) >= MAX_REGIONS:
            raise ResourceExhaustedError(f"{MAX_REGIONS} shared memory regions are registered; unregister some")
        if offset < 0 or byte_size <= 0:
            raise InvalidArgumentError(
                f"region {name!r} has offset {offset} and byte_size {byte_size}; they are 0 or more, and 1 or more",
                field="byte_size" if offset >= 0 else "offset",
            )
        opened = _open(key, self._prefix)
        size = os.fstat(opened.descriptor).st_size
        if offset + byte_size > size:
            raise InvalidArgumentError(
                f"region {name!r} would end at byte {offset + byte_size} of {key!r}, which has {size}",
                field="byte_size",
            )
        self._regions[name] = Region(name, key, offset, byte_size, opened)

    def unregister(self, name: str) -> None:
        """Removes a region, or all if the name is "". Requests in flight keep theirs. Unknown names are ignored."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str) -> list[Region]:
        return list(self._regions.values()) if not name else [self.find(name, "name")]

    def find(self, name: str, field: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            known = ", ".join(self._regions) or "none"
            raise NotFoundError(f"no shared memory region {name!r}; registered are: {known}", field=field)
        return region


def _open(key: str, prefix: str) -> _Object:
    """Opens an object. Raises NotFoundError, InvalidArgumentError if `key` names no shared memory object of this
    worker's user that begins with `prefix`, and ResourceExhaustedError if this worker cannot open any more."""
    file = key.removeprefix("/")
    # Semaphores lie in the same folder, and writing to one would let its processes run into one another.
    if not is_file_name(file) or file.startswith("sem."):
        raise InvalidArgumentError(f"{key!r} is no key of a POSIX shared memory object, such as /name", field="key")
    if not file.startswith(prefix):
        raise InvalidArgumentError(
            f"{key!r} should begin with {'/' + prefix!r} (RINGMESH_SHARED_MEMORY_PREFIX)", field="key"
        )
    try:
        opened = _Object(os.open(_FOLDER / file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if lacks := machine_fault(error):
            raise ResourceExhaustedError(
                f"cannot open the shared memory object {key!r}: {lacks}", field="key"
            ) from None
        raise NotFoundError(f"cannot open the shared memory object {key!r}: {error.strerror}", field="key") from None
    status = os.fstat(opened.descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgumentError(f"{key!r} is not a POSIX shared memory object", field="key")
    if status.st_uid != os.geteuid():
        raise InvalidArgumentError(
            f"{key!r} belongs to user {status.st_uid}; it should belong to the worker's, {os.geteuid()}",
            field="key",
        )
    return opened
