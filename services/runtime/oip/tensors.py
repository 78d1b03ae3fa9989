"""The v2 datatypes, and the two encodings of tensors: raw bytes, or equivalent typed contents."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import wire
from services.runtime.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Datatype:
    """A v2 datatype. For BYTES, `itemsize` is 0 and `dtype` object; `contents` is "" if only raw bytes can carry it."""

    name: str
    dtype: np.dtype[Any]
    itemsize: int
    contents: str


DATATYPES: Mapping[str, Datatype] = {
    name: Datatype(name, np.dtype(kind), 0 if kind is object else np.dtype(kind).itemsize, contents)
    for name, kind, contents in (
        ("BYTES", object, "bytes_contents"),
        ("BOOL", np.bool_, "bool_contents"),
        ("INT8", np.int8, "int_contents"),
        ("INT16", np.int16, "int_contents"),
        ("INT32", np.int32, "int_contents"),
        ("INT64", np.int64, "int64_contents"),
        ("UINT8", np.uint8, "uint_contents"),
        ("UINT16", np.uint16, "uint_contents"),
        ("UINT32", np.uint32, "uint_contents"),
        ("UINT64", np.uint64, "uint64_contents"),
        ("FP16", np.float16, ""),
        ("BF16", ml_dtypes.bfloat16, ""),
        ("FP32", np.float32, "fp32_contents"),
        ("FP64", np.float64, "fp64_contents"),
    )
}

_ELEMENTS_A_TURN = 1 << 16
# The length prefix of an element of BYTES.
_LENGTH = struct.Struct("<I")
# Contents fields whose packed elements equal the raw bytes.
_PLAIN = frozenset({"bool_contents", "fp32_contents", "fp64_contents"})
# The other fields' element types in protobuf, before they are narrowed to the width of the datatype.
_CARRIERS = {
    "int_contents": np.int32,
    "int64_contents": np.int64,
    "uint_contents": np.uint32,
    "uint64_contents": np.uint64,
}


def datatype(name: str, tensor: str, field: str = "") -> Datatype:
    """Returns the datatype by its name. Raises InvalidArgumentError naming `tensor` if there is none."""
    found = DATATYPES.get(name)
    if found is None:
        raise InvalidArgumentError(
            f"input {tensor!r}: no datatype {name!r}; there are {', '.join(DATATYPES)}", field=field
        )
    return found


def raw_from_contents(tensor: v2.ModelInferRequest.InferInputTensor, field: str = "") -> bytes:
    """Converts a tensor's typed contents to raw bytes.

    Raises InvalidArgumentError if the datatype has no typed encoding, or if other contents fields than its own are set.
    """
    kind = datatype(tensor.datatype, tensor.name, field and f"{field}.datatype")
    given = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if not kind.contents:
        raise InvalidArgumentError(
            f"input {tensor.name!r}: {kind.name} travels in raw_input_contents, never in contents", field=field
        )
    if any(name != kind.contents for name in given):
        raise InvalidArgumentError(
            f"input {tensor.name!r}: {kind.name} travels in contents.{kind.contents}, but {', '.join(given)} is set",
            field=field and f"{field}.contents",
        )
    values = getattr(tensor.contents, kind.contents)
    if kind.itemsize == 0:
        return _encode_bytes(values)
    if kind.contents in _PLAIN:
        # Protobuf's packed format: a tag, the size as a varint, then the raw bytes.
        packed = tensor.contents.SerializeToString()
        size = len(values) * kind.itemsize
        start = 1 + len(wire.varint(size))
        return packed[start : start + size]
    carried: npt.NDArray[Any] = np.empty(len(values), _CARRIERS[kind.contents])
    # In slices, so that other threads can take the GIL in between.
    for start in range(0, len(values), _ELEMENTS_A_TURN):
        carried[start : start + _ELEMENTS_A_TURN] = values[start : start + _ELEMENTS_A_TURN]
    return carried.astype(kind.dtype, copy=False).tobytes()


def decode(
    kind: Datatype, shape: Sequence[int], raw: bytes | memoryview, tensor: str, field: str = ""
) -> npt.NDArray[Any]:
    """Returns a read-only view of `raw`; for BYTES an object array. Raises InvalidArgumentError on a mismatch."""
    count = math.prod(shape)
    if kind.itemsize == 0:
        return _decode_bytes(bytes(raw), count, shape, tensor, field)
    if len(raw) != count * kind.itemsize:
        raise InvalidArgumentError(
            f"input {tensor!r}: {len(raw)} bytes for {kind.name} {list(shape)}, which takes {count * kind.itemsize} "
            f"({count} elements of {kind.itemsize})",
            field=field,
        )
    return np.frombuffer(raw, kind.dtype).reshape(shape)


def encode(array: npt.NDArray[Any]) -> bytes:
    """Returns raw bytes, row-major and little-endian; object arrays (of str or bytes) are encoded as BYTES."""
    if array.dtype != object:
        return array.tobytes()
    return _encode_bytes([value.encode() if isinstance(value, str) else value for value in array.ravel()])


def _encode_bytes(values: Iterable[bytes]) -> bytes:
    return b"".join([part for value in values for part in (len(value).to_bytes(4, "little"), value)])


def _decode_bytes(raw: bytes, count: int, shape: Sequence[int], tensor: str, field: str) -> npt.NDArray[Any]:
    if count * 4 > len(raw):  # checked before anything of that size is allocated
        raise InvalidArgumentError(
            f"input {tensor!r}: {len(raw)} bytes for BYTES {list(shape)}, whose {count} lengths alone take {count * 4}",
            field=field,
        )
    elements: list[bytes] = []
    position = 0
    for index in range(count):
        start = position + 4
        length = _LENGTH.unpack_from(raw, position)[0] if start <= len(raw) else 0
        position = start + length
        if position > len(raw):
            raise InvalidArgumentError(
                f"input {tensor!r}: element {index} of {count} says it has {length} bytes, "
                f"but {max(0, len(raw) - start)} are left",
                field=field,
            )
        elements.append(raw[start:position])
    if position != len(raw):
        raise InvalidArgumentError(
            f"input {tensor!r}: {len(raw) - position} bytes are left after the {count} elements of BYTES {list(shape)}",
            field=field,
        )
    return np.fromiter(elements, object, count).reshape(shape)
