"""Large messages: copied on threads and without the GIL, so that they block nothing else.

bytes.join releases the GIL if all its parts are bytes, and numpy.copyto always does. numpy.tobytes, slices and protobuf
do not release it, and take 0.1 to 0.7 ms a megabyte, depending on whether the pages are new.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Messages from this size are large: below it, a copy takes no more than a hand-over to a thread, or not much more.
LARGE_BYTES = 1 << 20

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)


def join_arrays(parts: Sequence[bytes | npt.NDArray[Any]]) -> bytes:
    """Concatenates `parts`, arrays row-major and little-endian. No array may hold objects."""
    size = sum([len(part) if isinstance(part, bytes) else part.nbytes for part in parts])
    # Bytes without contents, filled before other code sees them: CPython's own way to build bytes in place.
    made: bytes = _new_bytes(None, size)
    # Write through the address of the contents: NumPy's own view of bytes is read-only.
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
