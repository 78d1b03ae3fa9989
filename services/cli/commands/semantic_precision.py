"""Measures the precision of a semantic cache on the user's own vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import running
from services.cli.errors import CommandError
from services.runtime.oip.tensors import DATATYPES, decode

# Requests exact answers: computed, or cached for an equal request, but never the answer to a similar request.
_EXACT = (("cache-control", "max-age=31536000"),)
_SECONDS = 60.0

Array = npt.NDArray[Any]


def measure(address: str, model: str, data: Path, thresholds: Sequence[float]) -> Table:
    """Computes the answer to each vector. Returns the share answered by similarity and its precision, by threshold.

    `data` is a .npy file of shape [vectors, ...]. An answer is right if the position of the largest number is the same
    in each output. Raises CommandError.
    """
    try:
        vectors: Array = np.load(data, allow_pickle=False)
    except OSError as error:
        raise CommandError(f"cannot read {data}: {error.strerror}") from None
    except ValueError:
        raise CommandError(f"cannot read {data}: it should be a .npy file of vectors, one a row") from None
    if vectors.ndim < 2 or len(vectors) < 2:
        raise CommandError(f"{data} has shape {list(vectors.shape)}; it should have two vectors or more, one a row")

    def call(channel: grpc.Channel) -> list[Sequence[int]]:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        inputs = stub.ModelMetadata(v2.ModelMetadataRequest(name=model), timeout=_SECONDS).inputs
        if len(inputs) != 1 or inputs[0].datatype not in ("FP16", "FP32", "FP64"):
            raise CommandError(f"model {model!r} should have one input, of floating-point numbers")
        return [_answer(stub, model, inputs[0], vector) for vector in vectors]

    answers = running.ask(address, "router", call)
    table = Table("similarity of at least", "answered by a similar one", "of them right")
    for threshold in thresholds:
        answered, right = replay(vectors, answers, threshold)
        precision = f"{right / answered:.1%}" if answered else "none to judge"
        table.add_row(f"{threshold:g}", f"{answered / len(vectors):.1%}", precision)
    return table


def replay(vectors: Array, answers: Sequence[Sequence[int]], threshold: float) -> tuple[int, int]:
    """Replays the vectors in order. Returns how many a semantic cache would answer, and how many of those correctly."""
    flat = vectors.reshape(len(vectors), -1).astype(np.float32)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    units = np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0)
    known: list[int] = []
    answered = right = 0
    for index, unit in enumerate(units):
        if known:
            similarities = units[known] @ unit
            nearest = int(similarities.argmax())
            if similarities[nearest] >= threshold:
                answered += 1
                right += answers[known[nearest]] == answers[index]
                continue
        known.append(index)
    return answered, right


def _answer(
    stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub,
    model: str,
    tensor: v2.ModelMetadataResponse.TensorMetadata,
    vector: Array,
) -> Sequence[int]:
    """Returns the position of the largest number of each output; for text, the hash."""
    array = vector.astype(DATATYPES[tensor.datatype].dtype)
    shape = (1, *array.shape) if len(tensor.shape) > array.ndim else array.shape
    request = v2.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
    request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    response = stub.ModelInfer(request, timeout=_SECONDS, metadata=_EXACT)
    found = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        kind = DATATYPES[output.datatype]
        found.append(int(decode(kind, output.shape, raw, output.name).argmax()) if kind.itemsize else hash(raw))
    return found
