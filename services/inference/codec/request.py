"""Between ModelInferRequest and arrays: everything a caller can get wrong is found and named here."""

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
from services.runtime.oip.protocol import sequence_of
from services.runtime.oip.request_check import check_request, check_shape, shown
from services.runtime.oip.tensors import decode, encode, raw_from_contents
from services.runtime.request_limits import MAX_STRINGS

_REGION = "shared_memory_region"
_REGION_BYTES = _REGION.encode()
# The tag of raw_output_contents, which is field 6, length-delimited.
_RAW_OUTPUT = b"\x32"


# The bytes of a tensor.
_Raw: TypeAlias = bytes | npt.NDArray[np.uint8]


class Model(Protocol):
    """What a request needs to know of a model or an ensemble: see OnnxModel."""

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
    """Which sequence a request belongs to, and whether it begins or ends it."""

    sequence_id: int | str
    start: bool
    end: bool


class Decoded:
    """A request ready to run. `rows` is the size of the first dimension; `outputs` stand in the model's order.

    Requests of one `signature` may share a batch. `classes` holds the top-k asked for, by output. `priority`: 1 goes
    first, 0 is the model's default. `timeout_us`: how long it may be queued, 0 where it does not say.
    """

    __slots__ = (
        "arrays",
        "classes",
        "outputs",
        "priority",
        "regions",
        "rows",
        "sequence",
        "signature",
        "timeout_us",
        "trace_context",
    )

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
        # Whose request it is: a trace id (16 bytes) and a span id (8).
        self.trace_context = trace_context


def names_shared_memory(read: Read) -> bool:
    """Whether some of it may be in shared memory, so that a few bytes of it stand for many."""
    return _REGION_BYTES in (read.data if read.parts is None else read.parts.head)


def decode_request(
    request: v2.ModelInferRequest, model: Model, memory: SharedMemory, trace_context: bytes = b""
) -> Decoded:
    """Raises InvalidArgumentError naming the field and what it should be, NotFoundError for an unknown region.

    ResourceExhaustedError where more than MAX_REQUEST_BYTES are in shared memory.
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
    decoded.priority = _whole_parameter(request, "priority")
    decoded.timeout_us = _whole_parameter(request, "timeout")
    decoded.sequence = _sequence(request)
    return decoded


def prepare(arrays: dict[str, npt.NDArray[Any]], model: Model, outputs: tuple[str, ...], request: Decoded) -> Decoded:
    """A request of `model` on behalf of another: arrays in its datatypes. Raises InvalidArgumentError."""
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
    if len(arrays) > len(model.required):
        # An optional input is for the whole run, so the request that gives one has a run of its own.
        signature = object()
    return Decoded(arrays, _rows(arrays, model), outputs, {}, {}, signature, trace_context=trace_context)


def encode_response(model: Model, decoded: Decoded, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """A serialized ModelInferResponse without an id; always raw_output_contents, one an output."""
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
    """`head` and raw_output_contents. What is large is copied once, and without the GIL."""
    parts: list[bytes | npt.NDArray[Any]] = [head]
    for raw in raws:
        parts += (_RAW_OUTPUT, wire.varint(len(raw)), raw)
    return join_arrays(parts)


def _raw(array: npt.NDArray[Any]) -> _Raw:
    """Strings, which have objects, are put together; of what is large nothing is copied yet."""
    if array.dtype.hasobject or array.nbytes <= LARGE_BYTES:
        return encode(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@lru_cache(maxsize=4096)
def _response_head(name: str, version: int, outputs: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """All fields before raw_output_contents, which comes last on the wire: the same for many responses."""
    response = v2.ModelInferResponse(model_name=name, model_version=str(version))
    for output, datatype, shape in outputs:
        response.outputs.add(name=output, datatype=datatype, shape=shape)
    return response.SerializeToString()


def _encode_as_asked(model: Model, decoded: Decoded, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """With classes in place of values, and with outputs left in shared memory."""
    response = v2.ModelInferResponse(model_name=model.name, model_version=str(model.version))
    raws: list[_Raw] = []
    for name, array in zip(decoded.outputs, arrays, strict=True):
        datatype = model.outputs[name].datatype.name
        if name in decoded.classes:
            array = _classify(array, decoded.classes[name], model.has_rows, model.labels.get(name, ()))
            datatype = "BYTES"
        told = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw = _raw(array)
        if name in decoded.regions:
            decoded.regions[name].write(raw, told)
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
    name, offset, size = _place(tensor.parameters, field)
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
            max(0, _place(tensor.parameters, f"inputs[{index}].parameters")[2])
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
    """The outputs asked for, in the model's order; fills `classes` and `regions`."""
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
            region_name, offset, size = _place(output.parameters, field)
            region = memory.find(region_name, field)
            region.check(offset, size, field)
            regions[name] = _OutputRegion(region, offset, size)
    return tuple([name for name in model.outputs if name in asked])


def _sequence(request: v2.ModelInferRequest) -> SequenceStep | None:
    sequence_id = sequence_of(request)
    if not sequence_id:
        return None
    return SequenceStep(sequence_id, _flag(request, "sequence_start"), _flag(request, "sequence_end"))


def _flag(request: v2.ModelInferRequest, name: str) -> bool:
    """False where it is not given."""
    if name not in request.parameters:
        return False
    if request.parameters[name].WhichOneof("parameter_choice") != "bool_param":
        raise InvalidArgumentError(f"{name} must be true or false, in bool_param", field=f"parameters.{name}")
    return request.parameters[name].bool_param


def _whole_parameter(request: v2.ModelInferRequest, name: str) -> int:
    """0 where it is not given."""
    if name not in request.parameters:
        return 0
    given = request.parameters[name]
    kind = given.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param") or getattr(given, kind) < 0:
        raise InvalidArgumentError(
            f"{name} must be a whole number, 0 or more, in int64_param or uint64_param", field=f"parameters.{name}"
        )
    return int(getattr(given, kind))


def _place(parameters: Mapping[str, v2.InferParameter], field: str) -> tuple[str, int, int]:
    """(region, offset, byte size) of a tensor in shared memory."""
    sizes = []
    for name in ("shared_memory_offset", "shared_memory_byte_size"):
        kind = parameters[name].WhichOneof("parameter_choice") if name in parameters else "int64_param"
        if kind not in ("int64_param", "uint64_param"):
            raise InvalidArgumentError(f"{name} is a whole number, in int64_param or uint64_param", field=field)
        sizes.append(int(getattr(parameters[name], kind)) if name in parameters else 0)
    return parameters[_REGION].string_param, sizes[0], sizes[1]


class _OutputRegion:
    """Where an output is to be left."""

    __slots__ = ("offset", "region", "size")

    def __init__(self, region: Region, offset: int, size: int) -> None:
        self.region = region
        self.offset = offset
        self.size = size

    def write(self, raw: _Raw, told: v2.ModelInferResponse.InferOutputTensor) -> None:
        """Leaves the output there and says so. Raises InvalidArgumentError where it does not fit (any more)."""
        if len(raw) > self.size:
            raise InvalidArgumentError(
                f"output {told.name!r} has {len(raw)} bytes, and {self.size} are given to it in shared memory "
                f"region {self.region.name!r}",
                field="outputs",
            )
        self.region.write(self.offset, raw, "outputs")
        told.parameters[_REGION].string_param = self.region.name
        told.parameters["shared_memory_offset"].int64_param = self.offset
        told.parameters["shared_memory_byte_size"].int64_param = len(raw)


def _rows(arrays: Mapping[str, npt.NDArray[Any]], model: Model) -> int:
    if not model.has_rows:
        return 1
    sizes = {name: arrays[name].shape[0] for name in model.required}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name!r}: {rows}" for name, rows in sizes.items())
        raise InvalidArgumentError(f"the inputs differ in their first dimension, the batch: {listed}", field="inputs")
    rows = next(iter(sizes.values()), 1)
    if 0 < model.max_request_rows < rows:
        raise InvalidArgumentError(
            f"the request has {rows} rows; model {model.name!r} takes {model.max_request_rows} at most, which is its "
            "max_batch_size",
            field="inputs",
        )
    return rows


def _classify(array: npt.NDArray[Any], count: int, batched: bool, labels: Sequence[bytes]) -> npt.NDArray[Any]:
    """`value:index:label` of the `count` highest of each row, highest first, as Triton gives them.

    Without `:label` for a class that has none. Raises InvalidArgumentError where they are too many.
    """
    rows = array.reshape((len(array), math.prod(array.shape[1:])) if batched else (1, array.size))
    if min(count, rows.shape[1]) * len(rows) > MAX_STRINGS:
        raise InvalidArgumentError(
            f"{count} classes of {len(rows)} rows are asked for; an answer has {MAX_STRINGS} at most", field="outputs"
        )
    whole = rows.dtype.kind in "iu"
    if not whole:
        rows = rows.astype(np.float64)
    # Integers in reverse order by their complement: it is exact, and the negative of an unsigned one is not.
    top = np.argsort(~rows if whole else -rows, axis=1, kind="stable")[:, :count]
    made = np.empty(top.shape, object)
    for row, indices in enumerate(top):
        for place, index in enumerate(indices.tolist()):
            text = f"{rows[row, index]:{'d' if whole else 'f'}}:{index}".encode()
            label = labels[index] if index < len(labels) else b""
            made[row, place] = text + b":" + label if label else text
    return made if batched else made[0]
