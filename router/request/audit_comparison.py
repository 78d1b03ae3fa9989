"""Compares two answers to one request: bitwise equal, equal within a tolerance, or different."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip.tensors import DATATYPES

# The last bits of a row depend on the other rows of its batch. Tolerated difference, relative to the largest magnitude.
_TOLERANCE = {"FP64": 1e-3, "FP32": 1e-3, "FP16": 1e-2, "BF16": 3e-2}


class Comparison(NamedTuple):
    """How an answer compares with its recomputed value. `largest` is the largest difference between two numbers."""

    result: str
    largest: float


def compare(answer: bytes, again: bytes) -> Comparison:
    """Compares two serialized ModelInferResponses without ids: equal, close (within the tolerance) or different."""
    if answer == again:
        return Comparison("equal", 0.0)
    one, other = (v2.ModelInferResponse.FromString(data) for data in (answer, again))
    if [_head(output) for output in one.outputs] != [_head(output) for output in other.outputs]:
        return Comparison("different", 0.0)
    close, largest = True, 0.0
    for output, first, second in zip(one.outputs, one.raw_output_contents, other.raw_output_contents, strict=True):
        if first == second:
            continue
        tolerance = _TOLERANCE.get(output.datatype, 0.0)
        if not DATATYPES[output.datatype].itemsize:
            close = False
            continue
        difference, magnitude = _difference(*(_numbers(output.datatype, raw) for raw in (first, second)))
        largest = max(largest, difference)
        close = close and difference <= tolerance * magnitude
    return Comparison("close" if close else "different", largest)


def _head(output: v2.ModelInferResponse.InferOutputTensor) -> tuple[str, str, Sequence[int]]:
    return output.name, output.datatype, [*output.shape]


def _numbers(datatype: str, raw: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(raw, DATATYPES[datatype].dtype).astype(np.float64)


def _difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[float, float]:
    """The largest difference (infinite if only one of two values is a number) and the largest finite magnitude."""
    alike = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        differences = np.where(alike, 0.0, np.abs(one - other))
    magnitude = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return float(np.nan_to_num(differences, nan=np.inf, posinf=np.inf).max(initial=0.0)), float(magnitude)
