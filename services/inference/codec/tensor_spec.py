"""The inputs and outputs of a model, as its file and its configuration define them."""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.repository import batching_policy
from services.inference.repository.config import ConfigError, ModelConfig
from services.runtime.oip.tensors import DATATYPES, Datatype

_ONNX_NAMES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float", "FP64": "double", "BYTES": "string"}
_BY_ONNX_TYPE = {f"tensor({_ONNX_NAMES.get(name, name.lower())})": kind for name, kind in DATATYPES.items()}


class UnservableError(Exception):
    """The file has a tensor that the protocol cannot carry, or whose rank is unknown; the message names it."""


# The configuration calls BYTES TYPE_STRING.
CONFIG_TYPES = {
    name: config_pb2.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}") for name in DATATYPES
}


def datatype_of(node: Any) -> Datatype | None:
    """The datatype of an ONNX Runtime NodeArg; None if it is not a tensor, or the protocol lacks its type."""
    return _BY_ONNX_TYPE.get(node.type)


_BY_CONFIG_TYPE = {number: DATATYPES[name] for name, number in CONFIG_TYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output as callers see it. -1 in `shape` is a dimension that the request decides.

    `inner`: the shape in the file, if the configuration reshapes the tensor. An `optional` input may be left out and
    has no batch dimension.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    inner: tuple[int, ...] | None = None
    optional: bool = False

    def to_inner(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array if self.inner is None else array.reshape(_fill(self.inner, self.shape, array.shape))

    def to_outer(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array if self.inner is None else array.reshape(_fill(self.shape, self.inner, array.shape))


def input_specs(
    nodes: Collection[Any], initializers: Iterable[Any], configured: ModelConfig, unranked: Collection[str]
) -> dict[str, TensorSpec]:
    """The specs of the file's inputs, and of the overridable `initializers` that the configuration offers.

    Nodes are ONNX Runtime's NodeArg. `unranked`: names of the tensors without a rank in the file. Raises ConfigError if
    the configuration contradicts the file, and UnservableError.
    """
    declared = {tensor.name: tensor for tensor in configured.input}
    specs = _specs(nodes, configured.input, configured, {node.name for node in initializers}, unranked)
    for name in specs.keys() & unranked:
        if name not in declared or not (declared[name].dims or declared[name].HasField("reshape")):
            raise UnservableError(f"the file does not say how many dimensions input {name!r} has; config.pbtxt has to")
    for name, tensor in declared.items():
        if tensor.optional and name in specs:
            raise ConfigError(f"says {name!r} is optional; the file gives it no value to stand in, so it is not")
    for node in initializers:
        if node.name in declared:
            if not declared[node.name].optional:
                raise ConfigError(f"names {node.name!r}, which has a value in the file; say optional to offer it")
            specs[node.name] = _spec(node, node.shape, optional=True)
    return specs


def output_specs(nodes: Collection[Any], configured: ModelConfig, unranked: Collection[str]) -> dict[str, TensorSpec]:
    """The specs of the file's outputs, as `input_specs`. An unknown shape is [-1]."""
    return _specs(nodes, configured.output, configured, set(), unranked)


def declared_spec(tensor: config_pb2.ModelInput | config_pb2.ModelOutput, batched: bool) -> TensorSpec:
    """The spec of a tensor that only the configuration declares, such as an ensemble's. Raises ConfigError."""
    if tensor.data_type not in _BY_CONFIG_TYPE:
        raise ConfigError(f"gives {tensor.name!r} no data_type")
    return TensorSpec(tensor.name, _BY_CONFIG_TYPE[tensor.data_type], (*((-1,) if batched else ()), *tensor.dims))


def _specs(
    nodes: Collection[Any],
    declared: Iterable[config_pb2.ModelInput | config_pb2.ModelOutput],
    configured: ModelConfig,
    ignore: set[str],
    unranked: Collection[str],
) -> dict[str, TensorSpec]:
    # ONNX Runtime reports tensors without a rank as scalars.
    unknown = {node.name for node in nodes if node.name in unranked and not node.shape}
    specs = {node.name: _spec(node, (-1,) if node.name in unknown else node.shape) for node in nodes}
    for tensor in declared:
        if tensor.name in ignore:
            continue
        if tensor.name not in specs:
            raise ConfigError(f"names {tensor.name!r}; the file has {', '.join(map(repr, specs))}")
        specs[tensor.name] = _declared(tensor, specs[tensor.name], configured, tensor.name not in unknown)
    return specs


def _spec(node: Any, shape: Sequence[int | str | None], optional: bool = False) -> TensorSpec:
    datatype = datatype_of(node)
    if datatype is None:
        hint = "; convert the model without ZipMap" if "map(" in node.type else ""
        raise UnservableError(f"{node.name!r} is a {node.type}, for which the v2 protocol has no datatype{hint}")
    sizes = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in shape)
    return TensorSpec(node.name, datatype, sizes, optional=optional)


def _declared(
    declared: config_pb2.ModelInput | config_pb2.ModelOutput, spec: TensorSpec, configured: ModelConfig, ranked: bool
) -> TensorSpec:
    """Applies a declaration to the file's `spec`. Raises ConfigError if the two contradict each other."""
    name, dims = declared.name, (*declared.dims,)
    if declared.data_type not in (config_pb2.TYPE_INVALID, CONFIG_TYPES[spec.datatype.name]):
        given = config_pb2.DataType.Name(declared.data_type)
        raise ConfigError(f"says {name!r} is {given}; the file says {spec.datatype.name}")
    reshaped = declared.HasField("reshape")
    inner = (*declared.reshape.shape,) if reshaped else dims
    # The batch dimension, if there is one, precedes the dims.
    left_out = batching_policy.policy(configured).dims_leave_out_batch
    batches: list[tuple[int, ...]] = [(), (-1,)] if left_out is None else [(-1,)] if left_out else [()]
    if ranked and not (spec.shape or reshaped or left_out) and set(dims) == {1}:
        # As in Triton, whose configurations have no other form for a scalar.
        return TensorSpec(name, spec.datatype, dims, inner=())
    fitting = [batch for batch in batches if agree((*batch, *inner), spec.shape)]
    if not ranked and (dims or reshaped):
        fitting = batches
        spec = TensorSpec(name, spec.datatype, (*fitting[0], *inner))
    if not fitting and (dims or reshaped):
        kind = "a reshape to" if reshaped else "dims"
        why = ""
        if left_out:
            why = f": max_batch_size adds a dimension for the batch, so they should be {list(spec.shape[1:])}"
        elif left_out is False and len(inner) < len(spec.shape):
            why = ": there is no max_batch_size that would add a dimension for the batch, so they should be the same"
        raise ConfigError(f"gives {name!r} {kind} {list(inner)}; the file has {list(spec.shape)}{why}")
    if not reshaped:
        if dims and isinstance(declared, config_pb2.ModelInput):
            # As in Triton, a configuration may fix sizes of an input that the file leaves free.
            known = (*fitting[0], *dims) if left_out is not None else (-1, *(*fitting[0], *dims)[1:])
            sizes = [given if size == -1 else size for size, given in zip(spec.shape, known, strict=True)]
            spec = TensorSpec(name, spec.datatype, (*sizes,))
        return spec
    if dims.count(-1) != inner.count(-1) or _elements(dims) != _elements(inner):
        raise ConfigError(f"reshapes {name!r} from {list(dims)} to {list(inner)}, which differ in their elements")
    return TensorSpec(name, spec.datatype, (*fitting[0], *dims), inner=(*fitting[0], *inner))


def _fill(wanted: Sequence[int], given: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """`wanted` with each -1 replaced, in order, by the size in `sizes` at the matching -1 of `given`."""
    free = (size for known, size in zip(given, sizes, strict=True) if known == -1)
    return [next(free) if size == -1 else size for size in wanted]


def _elements(dims: Iterable[int]) -> int:
    return math.prod(size for size in dims if size != -1)


def agree(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether an array can have both shapes; -1 matches any size."""
    return len(one) == len(other) and all(-1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))
