"""A real inference, built from the fields of a form and sent through the router."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

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
class Field:
    """One input tensor in the form: its shape as in `1, 64`, its values as JSON or one of WORDS."""

    name: str
    datatype: str
    declared: str
    shape: str
    values: str


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor, with its first values as text."""

    name: str
    datatype: str
    shape: str
    values: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The response. `error` is the status as text; "" on success."""

    seconds: float
    trace_id: str
    outcome: str = ""
    worker: str = ""
    compute_seconds: float = math.nan
    error: str = ""
    outputs: Sequence[Output] = ()


def blank(metadata: v2.ModelMetadataResponse) -> list[Field]:
    """Returns the form of a model, filled with valid values."""
    fields = []
    for tensor in metadata.inputs:
        shape = [1 if size < 0 else size for size in tensor.shape]
        declared = " × ".join("any" if size < 0 else str(size) for size in tensor.shape)  # noqa: RUF001
        count = math.prod(shape)
        values = "random" if count > _TYPED else json.dumps(_listed(fill("random", tensor.datatype, shape)))
        fields.append(Field(tensor.name, tensor.datatype, declared, ", ".join(map(str, shape)), values))
    return fields


def typed(metadata: v2.ModelMetadataResponse, form: Mapping[str, str]) -> list[Field]:
    """Returns the form of a model, filled with the submitted values."""
    return [
        Field(
            field.name,
            field.datatype,
            field.declared,
            form.get(f"shape:{field.name}", field.shape),
            form.get(f"values:{field.name}", field.values),
        )
        for field in blank(metadata)
    ]


def headers(cache_control: str, tenant: str) -> dict[str, str]:
    """Returns the metadata of the request. Raises TrialError if a value is not valid metadata."""
    made = {"cache-control": cache_control, "ringmesh-tenant": tenant}
    for name, value in made.items():
        if not (value.isascii() and value.isprintable() and len(value) <= _LONGEST_HEADER):
            raise TrialError(f"{name} has up to {_LONGEST_HEADER} printable ASCII characters")
    return made


def build(model: str, fields: Sequence[Field]) -> v2.ModelInferRequest:
    """Builds the request from the form. Raises TrialError."""
    request = v2.ModelInferRequest(model_name=model)
    for field in fields:
        array = _read(field)
        request.inputs.add(name=field.name, datatype=field.datatype, shape=array.shape)
        request.raw_input_contents.append(tensors.encode(array))
    return request


async def send(channel: grpc.aio.Channel, request: v2.ModelInferRequest, headers: Mapping[str, str]) -> Answer:
    """Sends the request with a sampled trace. Non-empty `headers` are sent as metadata."""
    trace_id = f"{random.getrandbits(128) or 1:032x}"
    context = ("traceparent", f"00-{trace_id}-{random.getrandbits(64) or 1:016x}-01")
    metadata = [context, *((name, value) for name, value in headers.items() if value)]
    infer: _Infer = channel.unary_unary(INFER)
    call = infer(request.SerializeToString(), metadata=metadata, timeout=_SECONDS)
    start = time.perf_counter()
    try:
        body = await call
    except grpc.aio.AioRpcError as error:
        return Answer(time.perf_counter() - start, trace_id, error=f"{error.code().name}: {error.details()}")
    took = time.perf_counter() - start
    told = dict(await call.trailing_metadata())
    compute = told.get("ringmesh-compute-us", "")
    return Answer(
        took,
        trace_id,
        outcome=str(told.get("ringmesh-cache", "")),
        worker=str(told.get("ringmesh-worker", "")),
        compute_seconds=int(compute) / 1e6 if str(compute).isdecimal() else math.nan,
        outputs=_outputs(v2.ModelInferResponse.FromString(body)),
    )


def _outputs(response: v2.ModelInferResponse) -> list[Output]:
    shown = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        kind = tensors.datatype(output.datatype, output.name)
        array = tensors.decode(kind, output.shape, raw, output.name)
        flat = array.ravel()[:_SHOWN]
        values = json.dumps(_listed(flat), ensure_ascii=False)
        more = f" … {array.size - _SHOWN:,} more" if array.size > _SHOWN else ""
        shown.append(Output(output.name, output.datatype, " × ".join(map(str, output.shape)), values + more))  # noqa: RUF001
    return shown


def _read(field: Field) -> npt.NDArray[Any]:
    try:
        shape = [int(part) for part in field.shape.replace("×", ",").split(",") if part.strip()]  # noqa: RUF001
    except ValueError:
        raise TrialError(f"{field.name}: the shape is whole numbers with commas between, such as 1, 64") from None
    if len(shape) > _MAX_DIMENSIONS:
        raise TrialError(f"{field.name}: a shape has up to {_MAX_DIMENSIONS} dimensions, not {len(shape):,}")
    # NumPy limits the product of the non-zero dimensions, even for an empty array.
    if any(size < 0 for size in shape) or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise TrialError(f"{field.name}: a shape has no negative sizes, and up to {_MAX_ELEMENTS:,} elements here")
    text = field.values.strip()
    if text in WORDS:
        return fill(text, field.datatype, shape)
    try:
        values = json.loads(text)
        dtype = _dtype(field.datatype)
        if dtype.kind == "O":
            array = np.array([value.encode() for value in np.array(values, object).ravel()], object)
        else:
            array = np.array(values, dtype).ravel()
        return array.reshape(shape)
    except RecursionError:
        raise TrialError(f"{field.name}: the values are nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise TrialError(
            f"{field.name}: {field.datatype} values are a JSON list with {math.prod(shape):,} in all for the shape "
            f"{field.shape}, or one of the words {', '.join(WORDS)} ({error})"
        ) from None


def _dtype(datatype: str) -> np.dtype[Any]:
    try:
        return tensors.datatype(datatype, "").dtype
    except InvalidArgumentError as error:
        raise TrialError(error.message) from None


def _listed(array: npt.NDArray[Any]) -> list[Any]:
    if array.dtype == object:
        return [value[:_LONGEST_VALUE].decode(errors="replace") for value in array.ravel()]
    if array.dtype.kind in "biu":
        return array.ravel().tolist()
    return [float(f"{value:.6g}") for value in array.ravel().astype(np.float64)]
