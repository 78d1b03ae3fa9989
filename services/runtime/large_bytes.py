"""Large messages: copied on threads and without the GIL, so that they hold up nothing else.

bytes.join lets go of the GIL where all its parts are bytes, and numpy.copyto always; numpy.tobytes, slices and protobuf
do not, and take 0.1 to 0.7 ms a megabyte, by whether the pages are new.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# From here on a message is large: below, a copy takes less than handing it to a thread, or not much more.
LARGE_BYTES = 1 << 20

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)


def join_arrays(parts: Sequence[bytes | npt.NDArray[Any]]) -> bytes:
    """The parts one after the other, arrays row-major and little-endian; none of them holds objects."""
    size = sum([len(part) if isinstance(part, bytes) else part.nbytes for part in parts])
    # Without contents, which are written before anybody else has it: Python's own way to make bytes piece by piece.
    made: bytes = _new_bytes(None, size)
    # The address of its contents; what NumPy itself makes of bytes may not be written.
    address = np.frombuffer(made, np.uint8).ctypes.data if size else 0
    room = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address)) if size else np.empty(0, np.uint8)
    position = 0
    for part in parts:
        if isinstance(part, bytes):
            flat = np.frombuffer(part, np.uint8)
        else:
            flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        np.copyto(room[position : position + flat.size], flat)
        position += flat.size
    return made
