"""Decodes requests. For a kind of request seen before, it reads only the tensor data.

Callers send few kinds of requests. The fields besides data and id are checked once per kind, and the outcome is
remembered under their bytes.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.request import Decoded, Model, decode_request
from services.inference.codec.shared_memory import SharedMemory
from services.runtime.oip.infer_request import Read
from services.runtime.rpc.rpc import parse

MAX_KINDS = 4096


class _TensorKind(NamedTuple):
    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]
    size: int


class _RequestKind(NamedTuple):
    tensors: tuple[_TensorKind, ...]
    rows: int
    outputs: tuple[str, ...]
    signature: Hashable
    priority: int
    timeout_us: int


class RequestDecoder:
    """Decodes as `decode_request` does, for any number of models. Models with equal digests are the same."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._kinds: dict[bytes, _RequestKind] = {}

    def decode(self, read: Read, model: Model, trace_context: bytes = b"") -> Decoded:
        parts = read.parts
        if parts is None:
            return decode_request(read.head.message, model, self._memory, trace_context)
        raws = parts.raws
        head = model.digest + parts.head
        kind = self._kinds.get(head)
        if kind is not None and len(raws) == len(kind.tensors):
            arrays = {}
            for raw, (name, dtype, shape, size) in zip(raws, kind.tensors, strict=True):
                if len(raw) != size:
                    break
                arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
            else:
                priority, timeout_us = kind.priority, kind.timeout_us
                return Decoded(
                    arrays, kind.rows, kind.outputs, {}, {}, kind.signature, priority, timeout_us, None, trace_context
                )
        request = parse(v2.ModelInferRequest, read.data)
        decoded = decode_request(request, model, self._memory, trace_context)
        if (kind := _kind(request, decoded)) is not None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            self._kinds[head] = kind
        return decoded


def _kind(request: v2.ModelInferRequest, decoded: Decoded) -> _RequestKind | None:
    """The decoded fields that requests with equal bytes share; None if such requests differ in more than data."""
    if decoded.classes or decoded.regions or decoded.sequence is not None:
        return None
    # An input in shared memory has no raw contents. The signature of a request that runs alone is no tuple.
    if len(request.raw_input_contents) != len(request.inputs) or not isinstance(decoded.signature, tuple):
        return None
    tensors = []
    for tensor in request.inputs:
        array: npt.NDArray[Any] = decoded.arrays[tensor.name]
        if array.dtype.hasobject:
            return None
        tensors.append(_TensorKind(tensor.name, array.dtype, array.shape, array.nbytes))
    return _RequestKind(
        tuple(tensors), decoded.rows, decoded.outputs, decoded.signature, decoded.priority, decoded.timeout_us
    )
