"""A real inference, built from the fields of a form and sent through the router."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import w3c
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip import tensors
from services.runtime.oip.sample_tensor import WORDS, fill

INFER = "/inference.GRPCInferenceService/ModelInfer"
_SECONDS = 30.0
_SHOWN = 64
# A form lists the values of a tensor up to this count; larger tensors get the word `random`.
_TYPED = 256
_MAX_ELEMENTS = 1 << 20
# NumPy's own limit.
_MAX_DIMENSIONS = 64
_LONGEST_HEADER = 256
_LONGEST_VALUE = 200
_Infer: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


class TrialError(Exception):
    """The form is not a valid request. The message says what is valid."""


@dataclass(frozen=True, slots=True)
class TensorInput:
    """One input tensor in the form: its shape as in `1, 64`, its values as JSON or one of WORDS."""

    name: str
    datatype: str
    declared: str
    shape: str
    values: str


@dataclass(frozen=True, slots=True)
class TensorOutput:
    """One output tensor, with its first values as text."""

    name: str
    datatype: str
    shape: str
    values: str


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The response. `error` is the status as text; "" on success."""

    seconds: float
    trace_id: str
    outcome: str = ""
    worker: str = ""
    compute_seconds: float = math.nan
    error: str = ""
    outputs: Sequence[TensorOutput] = ()


def inputs(metadata: v2.ModelMetadataResponse, form: Mapping[str, str]) -> list[TensorInput]:
    """Returns the inputs of a model with the submitted values, or with valid examples where there are none."""
    found = []
    for tensor in metadata.inputs:
        shape = [1 if size < 0 else size for size in tensor.shape]
        declared = " × ".join("any" if size < 0 else str(size) for size in tensor.shape)  # noqa: RUF001
        example = "random"
        if math.prod(shape) <= _TYPED:
            example = json.dumps(_listed(fill("random", tensor.datatype, shape)))
        shape_text = form.get(f"shape:{tensor.name}", ", ".join(map(str, shape)))
        values = form.get(f"values:{tensor.name}", example)
        found.append(TensorInput(tensor.name, tensor.datatype, declared, shape_text, values))
    return found


def headers(cache_control: str, tenant: str) -> dict[str, str]:
    """Returns the metadata of the request. Raises TrialError if a value is not valid metadata."""
    metadata = {"cache-control": cache_control, "ringmesh-tenant": tenant}
    for name, value in metadata.items():
        if not (value.isascii() and value.isprintable() and len(value) <= _LONGEST_HEADER):
            raise TrialError(f"{name} must have up to {_LONGEST_HEADER} printable ASCII characters")
    return metadata


def build(model: str, fields: Sequence[TensorInput]) -> v2.ModelInferRequest:
    """Builds the request from the form. Raises TrialError."""
    request = v2.ModelInferRequest(model_name=model)
    for field in fields:
        array = _read(field)
        request.inputs.add(name=field.name, datatype=field.datatype, shape=array.shape)
        request.raw_input_contents.append(tensors.encode(array))
    return request


async def send(channel: grpc.aio.Channel, request: v2.ModelInferRequest, headers: Mapping[str, str]) -> TrialResult:
    """Sends the request with a sampled trace. Non-empty `headers` are sent as metadata."""
    trace_id = w3c.new_trace_id()
    context = ("traceparent", w3c.traceparent(trace_id, w3c.new_span_id(), sampled=True))
    metadata = [context, *((name, value) for name, value in headers.items() if value)]
    infer: _Infer = channel.unary_unary(INFER)
    call = infer(request.SerializeToString(), metadata=metadata, timeout=_SECONDS)
    start = time.perf_counter()
    try:
        body = await call
    except grpc.aio.AioRpcError as error:
        return TrialResult(time.perf_counter() - start, trace_id, error=f"{error.code().name}: {error.details()}")
    seconds = time.perf_counter() - start
    trailers = dict(await call.trailing_metadata())
    compute = trailers.get("ringmesh-compute-us", "")
    return TrialResult(
        seconds,
        trace_id,
        outcome=str(trailers.get("ringmesh-cache", "")),
        worker=str(trailers.get("ringmesh-worker", "")),
        compute_seconds=int(compute) / 1e6 if str(compute).isdecimal() else math.nan,
        outputs=_outputs(v2.ModelInferResponse.FromString(body)),
    )


def _outputs(response: v2.ModelInferResponse) -> list[TensorOutput]:
    shown = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        kind = tensors.datatype(output.datatype, output.name)
        array = tensors.decode(kind, output.shape, raw, output.name)
        flat = array.ravel()[:_SHOWN]
        values = json.dumps(_listed(flat), ensure_ascii=False)
        more = f" … {array.size - _SHOWN:,} more" if array.size > _SHOWN else ""
        shown.append(TensorOutput(output.name, output.datatype, " × ".join(map(str, output.shape)), values + more))  # noqa: RUF001
    return shown


def _read(field: TensorInput) -> npt.NDArray[Any]:
    try:
        shape = [int(part) for part in field.shape.replace("×", ",").split(",") if part.strip()]  # noqa: RUF001
    except ValueError:
        raise TrialError(f"{field.name}: the shape must be whole numbers separated by commas, such as 1, 64") from None
    if len(shape) > _MAX_DIMENSIONS:
        raise TrialError(f"{field.name}: a shape must have up to {_MAX_DIMENSIONS} dimensions, not {len(shape):,}")
    # NumPy limits the product of the non-zero dimensions, even for an empty array.
    if any(size < 0 for size in shape) or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise TrialError(
            f"{field.name}: a shape must have no negative sizes, and up to {_MAX_ELEMENTS:,} elements here"
        )
    text = field.values.strip()
    if text in WORDS:
        return fill(text, field.datatype, shape)
    try:
        values = json.loads(text)
        dtype = tensors.datatype(field.datatype, "").dtype
        if dtype.kind == "O":
            array = np.array([value.encode() for value in np.array(values, object).ravel()], object)
        else:
            array = np.array(values, dtype).ravel()
        return array.reshape(shape)
    except InvalidArgumentError as error:
        raise TrialError(error.message) from None
    except RecursionError:
        raise TrialError(f"{field.name}: the values are nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise TrialError(
            f"{field.name}: {field.datatype} values must be a JSON list of {math.prod(shape):,} in all for the shape "
            f"{field.shape}, or one of the words {', '.join(WORDS)} ({error})"
        ) from None


def _listed(array: npt.NDArray[Any]) -> list[Any]:
    if array.dtype == object:
        return [value[:_LONGEST_VALUE].decode(errors="replace") for value in array.ravel()]
    if array.dtype.kind in "biu":
        return array.ravel().tolist()
    return [float(f"{value:.6g}") for value in array.ravel().astype(np.float64)]
