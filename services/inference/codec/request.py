"""Converts between ModelInferRequest and arrays. Detects every error of a caller and names the field."""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.shared_memory import MAX_REQUEST_BYTES, Region, SharedMemory
from services.inference.codec.tensor_spec import TensorSpec
from services.runtime import wire
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.large_bytes import LARGE_BYTES, join_arrays
from services.runtime.oip.infer_request import Read
from services.runtime.oip.protocol import SEQUENCE_TENANT, sequence_of
from services.runtime.oip.request_check import check_request, check_shape, shown, whole_number
from services.runtime.oip.tensors import decode, encode, raw_from_contents
from services.runtime.request_limits import MAX_STRINGS

_REGION = "shared_memory_region"
_REGION_BYTES = _REGION.encode()
# The tag of raw_output_contents, which is field 6, length-delimited.
_RAW_OUTPUT = b"\x32"


# The bytes of a tensor.
_Raw: TypeAlias = bytes | npt.NDArray[np.uint8]


class Model(Protocol):
    """The attributes of a model or ensemble that decoding and encoding need; see OnnxModel."""

    name: str
    version: int
    digest: bytes
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    required: tuple[str, ...]
    labels: Mapping[str, Sequence[bytes]]
    has_rows: bool
    max_request_rows: int


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """The sequence of a request, and whether the request begins or ends it. Each `tenant` has sequences of its own."""

    sequence_id: int | str
    start: bool
    end: bool
    tenant: str = ""

    @property
    def key(self) -> tuple[str, int | str]:
        return self.tenant, self.sequence_id


class Decoded:
    """A request ready to run. `rows`: size of the first dimension. `outputs`: names, in the model's order.

    Requests with equal `signature` may share a batch. `classes`: requested top-k, by output. `priority`: 1 is the
    highest, 0 the model's default. `timeout_us`: maximum time in the queue; 0 if the request sets none.
    """

    def __init__(
        self,
        arrays: dict[str, npt.NDArray[Any]],
        rows: int,
        outputs: tuple[str, ...],
        classes: Mapping[str, int],
        regions: Mapping[str, _OutputRegion],
        signature: Hashable,
        priority: int = 0,
        timeout_us: int = 0,
        sequence: SequenceStep | None = None,
        trace_context: bytes = b"",
    ) -> None:
        self.arrays = arrays
        self.rows = rows
        self.outputs = outputs
        self.classes = classes
        self.regions = regions
        self.signature = signature
        self.priority = priority
        self.timeout_us = timeout_us
        self.sequence = sequence
        # The span of the request: a trace id (16 bytes) and a span id (8 bytes).
        self.trace_context = trace_context


def names_shared_memory(read: Read) -> bool:
    """Whether the request may refer to shared memory; its tensors may then be larger than the request."""
    return _REGION_BYTES in (read.data if read.parts is None else read.parts.head)


def decode_request(
    request: v2.ModelInferRequest, model: Model, memory: SharedMemory, trace_context: bytes = b""
) -> Decoded:
    """Decodes and checks a request.

    Raises InvalidArgumentError with the field and its valid values, NotFoundError for an unknown region, and
    ResourceExhaustedError if more than MAX_REQUEST_BYTES are in shared memory.
    """
    raws = request.raw_input_contents
    tensors = request.inputs
    declared = {name: (spec.datatype.name, spec.shape) for name, spec in model.inputs.items()}
    check_request(request, model.name, declared, model.outputs)
    shared = [bool(tensor.parameters) and _REGION in tensor.parameters for tensor in tensors]
    if raws and len(raws) != len(tensors) - sum(shared):
        raise InvalidArgumentError(
            f"raw_input_contents has {len(raws)} entries for {len(tensors) - sum(shared)} inputs that are not in "
            "shared memory; each of them has one",
            field="raw_input_contents",
        )
    if any(shared):
        _check_shared_bytes(tensors)
    raw_of = iter(raws)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for index, tensor in enumerate(tensors):
        name = tensor.name
        spec = model.inputs[name]
        if shared[index]:
            arrays[name] = _decode_shared(tensor, spec, index, memory)
        else:
            arrays[name] = _decode_input(tensor, next(raw_of) if raws else None, spec, index)
    outputs: tuple[str, ...] = tuple(model.outputs)
    classes: dict[str, int] = {}
    regions: dict[str, _OutputRegion] = {}
    if request.outputs:
        outputs = _decode_outputs(request.outputs, model, classes, regions, memory)
    decoded = _decoded(arrays, model, outputs, trace_context)
    if not (classes or regions or request.parameters):
        return decoded
    decoded.classes = classes
    decoded.regions = regions
    decoded.priority = whole_number(request.parameters, "priority", "parameters.priority")
    decoded.timeout_us = whole_number(request.parameters, "timeout", "parameters.timeout")
    decoded.sequence = _sequence(request)
    return decoded


def prepare(arrays: dict[str, npt.NDArray[Any]], model: Model, outputs: tuple[str, ...], request: Decoded) -> Decoded:
    """A request to `model` on behalf of `request`. `arrays` have the model's datatypes. Raises InvalidArgumentError."""
    for index, (name, array) in enumerate(arrays.items()):
        check_shape(array.shape, model.inputs[name].shape, name, index)
    decoded = _decoded(arrays, model, outputs, request.trace_context)
    decoded.priority, decoded.timeout_us, decoded.sequence = request.priority, request.timeout_us, request.sequence
    return decoded


def _decoded(
    arrays: dict[str, npt.NDArray[Any]], model: Model, outputs: tuple[str, ...], trace_context: bytes
) -> Decoded:
    if len(arrays) != len(model.inputs) and (missing := [name for name in model.required if name not in arrays]):
        raise InvalidArgumentError(f"model {model.name!r} also needs input {shown(missing)}", field="inputs")
    signature: Hashable = (outputs, tuple([arrays[name].shape[1:] for name in model.required]))
    counts = [arrays[name].shape[0] for name in model.required] if model.has_rows else [1]
    rows = _rows(counts, model)
    if len(arrays) > len(model.required) or min(counts, default=rows) != rows or not rows:
        # An optional input applies to the whole run, and inputs with one row to all rows of the others, so such a
        # request does not share its run. Nor does one without rows: the proof is for one row at least.
        signature = object()
    return Decoded(arrays, rows, outputs, {}, {}, signature, trace_context=trace_context)


def encode_response(model: Model, decoded: Decoded, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """A serialized ModelInferResponse without an id. Every output has one entry in raw_output_contents."""
    if decoded.classes or decoded.regions:
        return _encode_as_asked(model, decoded, arrays)
    outputs = tuple(
        [
            (name, model.outputs[name].datatype.name, array.shape)
            for name, array in zip(decoded.outputs, arrays, strict=True)
        ]
    )
    head = _response_head(model.name, model.version, outputs)
    if sum([array.nbytes for array in arrays]) > LARGE_BYTES:
        return _joined(head, [_raw(array) for array in arrays])
    parts = [head]
    for array in arrays:
        raw = encode(array)
        parts += (_RAW_OUTPUT, wire.varint(len(raw)), raw)
    return b"".join(parts)


def _joined(head: bytes, raws: Sequence[_Raw]) -> bytes:
    """Joins `head` and raw_output_contents. Large outputs are copied once, without the GIL."""
    parts: list[bytes | npt.NDArray[Any]] = [head]
    for raw in raws:
        parts += (_RAW_OUTPUT, wire.varint(len(raw)), raw)
    return join_arrays(parts)


def _raw(array: npt.NDArray[Any]) -> _Raw:
    """The bytes of an output. Strings and small arrays are encoded; a large array is returned as a view."""
    if array.dtype.hasobject or array.nbytes <= LARGE_BYTES:
        return encode(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@lru_cache(maxsize=4096)
def _response_head(name: str, version: int, outputs: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """Serializes all fields before raw_output_contents, the last field on the wire. Many responses share them."""
    response = v2.ModelInferResponse(model_name=name, model_version=str(version))
    for output, datatype, shape in outputs:
        response.outputs.add(name=output, datatype=datatype, shape=shape)
    return response.SerializeToString()


def _encode_as_asked(model: Model, decoded: Decoded, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """As `encode_response`, for requests that want classes in place of values, or outputs in shared memory."""
    response = v2.ModelInferResponse(model_name=model.name, model_version=str(model.version))
    raws: list[_Raw] = []
    for name, array in zip(decoded.outputs, arrays, strict=True):
        datatype = model.outputs[name].datatype.name
        if name in decoded.classes:
            array = _classify(array, decoded.classes[name], model.has_rows, model.labels.get(name, ()))
            datatype = "BYTES"
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw = _raw(array)
        if name in decoded.regions:
            decoded.regions[name].write(raw, output)
            raw = b""
        raws.append(raw)
    return _joined(response.SerializeToString(), raws)


def _decode_input(
    tensor: v2.ModelInferRequest.InferInputTensor, raw: bytes | None, spec: TensorSpec, index: int
) -> npt.NDArray[Any]:
    name = tensor.name
    shape = (*tensor.shape,)
    if raw is None:
        if not tensor.HasField("contents") and 0 not in shape:
            raise InvalidArgumentError(
                f"input {name!r} has no data: neither raw_input_contents nor contents", field=f"inputs[{index}]"
            )
        _check_count(tensor, spec, shape, index)
        raw = raw_from_contents(tensor, f"inputs[{index}]")
    elif tensor.contents.ByteSize():
        raise InvalidArgumentError(
            f"input {name!r} has contents and raw_input_contents; it takes one", field=f"inputs[{index}].contents"
        )
    return decode(spec.datatype, shape, raw, name, f"inputs[{index}]")


def _decode_shared(
    tensor: v2.ModelInferRequest.InferInputTensor, spec: TensorSpec, index: int, memory: SharedMemory
) -> npt.NDArray[Any]:
    shape = (*tensor.shape,)
    if tensor.contents.ByteSize():
        raise InvalidArgumentError(
            f"input {tensor.name!r} has contents and is in shared memory; it takes one",
            field=f"inputs[{index}].contents",
        )
    field = f"inputs[{index}].parameters"
    name, offset, size = _region_part(tensor.parameters, field)
    region = memory.find(name, field)
    needed = math.prod(shape) * spec.datatype.itemsize
    if spec.datatype.itemsize and size != needed:
        raise InvalidArgumentError(
            f"input {tensor.name!r}: {size} bytes of shared memory region {name!r} for {spec.datatype.name} "
            f"{list(shape)}, which takes {needed}",
            field=field,
        )
    return decode(spec.datatype, shape, region.read(offset, size, field).data, tensor.name, field)


def _check_shared_bytes(tensors: Sequence[v2.ModelInferRequest.InferInputTensor]) -> None:
    size = sum(
        [
            _region_part(tensor.parameters, f"inputs[{index}].parameters")[2]
            for index, tensor in enumerate(tensors)
            if _REGION in tensor.parameters
        ]
    )
    if size > MAX_REQUEST_BYTES:
        raise ResourceExhaustedError(
            f"inputs in shared memory take {size} bytes; those of a request have at most {MAX_REQUEST_BYTES}",
            kind="too_large",
        )


def _check_count(
    tensor: v2.ModelInferRequest.InferInputTensor, spec: TensorSpec, shape: tuple[int, ...], index: int
) -> None:
    contents = spec.datatype.contents
    if not contents:
        return
    given = len(getattr(tensor.contents, contents))
    wanted = math.prod(shape)
    if given and given != wanted:
        raise InvalidArgumentError(
            f"input {tensor.name!r}: {given} elements in contents.{contents} for shape {list(shape)}, not {wanted}",
            field=f"inputs[{index}].contents.{contents}",
        )


def _decode_outputs(
    requested: Sequence[v2.ModelInferRequest.InferRequestedOutputTensor],
    model: Model,
    classes: dict[str, int],
    regions: dict[str, _OutputRegion],
    memory: SharedMemory,
) -> tuple[str, ...]:
    """The requested outputs, in the model's order; fills `classes` and `regions`."""
    asked: set[str] = set()
    for index, output in enumerate(requested):
        name = output.name
        asked.add(name)
        if "classification" in output.parameters:
            count = output.parameters["classification"].int64_param
            if count < 1 or model.outputs[name].datatype.name in ("BOOL", "BYTES"):
                raise InvalidArgumentError(
                    f"output {name!r}: classification is a number above 0, for numeric outputs",
                    field=f"outputs[{index}].parameters.classification",
                )
            classes[name] = count
        if _REGION in output.parameters:
            field = f"outputs[{index}].parameters"
            region_name, offset, size = _region_part(output.parameters, field)
            region = memory.find(region_name, field)
            region.check(offset, size, field)
            regions[name] = _OutputRegion(region, offset, size)
    return tuple([name for name in model.outputs if name in asked])


def _sequence(request: v2.ModelInferRequest) -> SequenceStep | None:
    sequence_id = sequence_of(request)
    if not sequence_id:
        return None
    # Without a look, a map would make an entry.
    tenant = request.parameters[SEQUENCE_TENANT].string_param if SEQUENCE_TENANT in request.parameters else ""
    return SequenceStep(sequence_id, _flag(request, "sequence_start"), _flag(request, "sequence_end"), tenant)


def _flag(request: v2.ModelInferRequest, name: str) -> bool:
    if name not in request.parameters:
        return False
    if request.parameters[name].WhichOneof("parameter_choice") != "bool_param":
        raise InvalidArgumentError(f"{name} must be true or false, in bool_param", field=f"parameters.{name}")
    return request.parameters[name].bool_param


def _region_part(parameters: Mapping[str, v2.InferParameter], field: str) -> tuple[str, int, int]:
    """(region, offset, byte size) of a tensor in shared memory."""
    offset = whole_number(parameters, "shared_memory_offset", field)
    return parameters[_REGION].string_param, offset, whole_number(parameters, "shared_memory_byte_size", field)


class _OutputRegion:
    """The part of a shared memory region that receives an output."""

    def __init__(self, region: Region, offset: int, size: int) -> None:
        self.region = region
        self.offset = offset
        self.size = size

    def write(self, raw: _Raw, output: v2.ModelInferResponse.InferOutputTensor) -> None:
        """Writes the output and describes it in `output`. Raises InvalidArgumentError if it does not fit (any more)."""
        if len(raw) > self.size:
            raise InvalidArgumentError(
                f"output {output.name!r} has {len(raw)} bytes, and {self.size} are given to it in shared memory "
                f"region {self.region.name!r}",
                field="outputs",
            )
        self.region.write(self.offset, raw, "outputs")
        output.parameters[_REGION].string_param = self.region.name
        output.parameters["shared_memory_offset"].int64_param = self.offset
        output.parameters["shared_memory_byte_size"].int64_param = len(raw)


def _rows(counts: Sequence[int], model: Model) -> int:
    """The rows of a request, from those of its inputs. They may differ only if no configuration says that they are a
    batch."""
    rows = max(counts, default=1)
    most = model.max_request_rows
    if most and min(counts, default=rows) != rows:
        listed = ", ".join(f"{name!r}: {count}" for name, count in zip(model.required, counts, strict=True))
        raise InvalidArgumentError(f"the inputs differ in their first dimension, the batch: {listed}", field="inputs")
    if 0 < most < rows:
        raise InvalidArgumentError(
            f"the request has {rows} rows; model {model.name!r} takes {most} at most, which is its max_batch_size",
            field="inputs",
        )
    return rows


def _classify(array: npt.NDArray[Any], count: int, batched: bool, labels: Sequence[bytes]) -> npt.NDArray[Any]:
    """The `count` highest values of each row as `value:index:label`, highest first, as in Triton.

    `:label` is omitted for a class without a label. Raises InvalidArgumentError if there are too many.
    """
    rows = array.reshape((len(array), math.prod(array.shape[1:])) if batched else (1, array.size))
    if min(count, rows.shape[1]) * len(rows) > MAX_STRINGS:
        raise InvalidArgumentError(
            f"{count} classes of {len(rows)} rows are asked for; an answer has {MAX_STRINGS} at most", field="outputs"
        )
    whole = rows.dtype.kind in "iu"
    if not whole:
        rows = rows.astype(np.float64)
    # The complement reverses the order of integers exactly; the negative of an unsigned integer does not.
    top = np.argsort(~rows if whole else -rows, axis=1, kind="stable")[:, :count]
    made = np.empty(top.shape, object)
    for row, indices in enumerate(top):
        for rank, index in enumerate(indices.tolist()):
            text = f"{rows[row, index]:{'d' if whole else 'f'}}:{index}".encode()
            label = labels[index] if index < len(labels) else b""
            made[row, rank] = text + b":" + label if label else text
    return made if batched else made[0]
