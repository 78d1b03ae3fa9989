"""What a request of one vector asks, so that it can be compared with others: for models that say so."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.tensors import DATATYPES, raw_from_contents

_VECTORS = frozenset({"FP16", "FP32", "FP64"})


class Question(NamedTuple):
    """`vector` is all of the input; `request` is the rest, which must be equal in requests that are compared."""

    vector: npt.NDArray[Any]
    request: v2.ModelInferRequest


def question(request: v2.ModelInferRequest) -> Question | None:
    """Takes the data out of `request`. None unless it has one input of floating-point numbers, in one row."""
    if len(request.inputs) != 1:
        return None
    tensor = request.inputs[0]
    if tensor.datatype not in _VECTORS or (len(tensor.shape) > 1 and tensor.shape[0] != 1):
        return None
    kind = DATATYPES[tensor.datatype]
    raw = request.raw_input_contents[0] if request.raw_input_contents else raw_from_contents(tensor)
    if len(raw) != kind.itemsize * np.prod(tensor.shape, dtype=np.int64):
        return None
    del request.raw_input_contents[:]
    tensor.ClearField("contents")
    request.ClearField("id")
    return Question(np.frombuffer(raw, kind.dtype), request)
