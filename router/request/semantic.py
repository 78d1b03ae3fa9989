"""What a request asks, as a vector, so that it can be compared with others: for models that say so."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip.tensors import DATATYPES, raw_from_contents

_VECTORS = frozenset({"FP16", "FP32", "FP64"})

Vector = npt.NDArray[Any]


class Question(NamedTuple):
    """`vector` is all of the input; `request` is the rest, which must be equal in requests that are compared."""

    vector: Vector
    request: v2.ModelInferRequest


def question(request: v2.ModelInferRequest) -> Question | None:
    """Takes the data out of `request`. None unless it has one input of floating-point numbers, in one row."""
    if len(request.inputs) != 1:
        return None
    tensor = request.inputs[0]
    raw = request.raw_input_contents[0] if request.raw_input_contents else raw_from_contents(tensor)
    vector = _vector(tensor.datatype, tensor.shape, raw)
    if vector is None:
        return None
    _clear(request)
    return Question(vector, request)


def to_embed(request: v2.ModelInferRequest, model: str) -> bytes | None:
    """The same inputs, asked of an embedding model; None unless they are one row."""
    if not request.inputs or any(tensor.shape and tensor.shape[0] != 1 for tensor in request.inputs):
        return None
    asked = v2.ModelInferRequest(model_name=model, inputs=request.inputs)
    asked.raw_input_contents.extend(request.raw_input_contents)
    return asked.SerializeToString()


def embedded(request: v2.ModelInferRequest, answer: bytes) -> Question | None:
    """By the embedding model's first output. None unless that is one vector of floating-point numbers.

    Takes the data out of `request`, and the shapes, which differ with the length of a text.
    """
    response = v2.ModelInferResponse.FromString(answer)
    if not response.outputs or not response.raw_output_contents:
        return None
    output = response.outputs[0]
    vector = _vector(output.datatype, output.shape, response.raw_output_contents[0])
    if vector is None:
        return None
    _clear(request)
    for tensor in request.inputs:
        del tensor.shape[:]
    return Question(vector, request)


def _vector(datatype: str, shape: Any, raw: bytes) -> Vector | None:
    if datatype not in _VECTORS or (len(shape) > 1 and shape[0] != 1):
        return None
    kind = DATATYPES[datatype]
    if len(raw) != kind.itemsize * np.prod(shape, dtype=np.int64):
        return None
    return np.frombuffer(raw, kind.dtype)


def _clear(request: v2.ModelInferRequest) -> None:
    del request.raw_input_contents[:]
    for tensor in request.inputs:
        tensor.ClearField("contents")
    request.ClearField("id")
