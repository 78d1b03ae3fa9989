"""Checks a request against its model's declared tensors, in at most one step for each declared tensor."""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.tensors import DATATYPES
from services.runtime.request_limits import MAX_STRINGS

# The datatype, and the shape; -1 stands for any size from 0.
Declared: TypeAlias = tuple[str, tuple[int, ...]]

# Parameters of a request, and of each of its tensors.
MAX_PARAMETERS = 64
# Shapes with more elements are refused before their bytes are counted.
_MAX_ELEMENTS = 1 << 40
# The same of a tensor without elements, its zeros left out: a model may make an output of these sizes from no data.
_MAX_EMPTY = 1 << 26
# Dimensions shown in an error message.
_MOST_SHOWN = 32


def check_request(
    request: v2.ModelInferRequest, model: str, inputs: Mapping[str, Declared], outputs: Collection[str]
) -> None:
    """Raises InvalidArgumentError with the wrong field and its expected value.

    It checks names, datatypes, shapes, the numbers of parameters and strings, priority and timeout, but neither data
    nor missing inputs.
    """
    _check_parameters(request.parameters, "parameters")
    # No part of the cache key: a request may join one with others, and must not be refused because of them.
    for parameter in ("priority", "timeout"):
        whole_number(request.parameters, parameter, f"parameters.{parameter}")
    names: set[str] = set()
    strings = 0
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        declared = inputs.get(name)
        if declared is None:
            raise InvalidArgumentError(
                f"model {model!r} has no input {name!r}; it has {shown(inputs)}", field=f"inputs[{index}].name"
            )
        if name in names:
            raise InvalidArgumentError(f"input {name!r} is given twice", field=f"inputs[{index}].name")
        names.add(name)
        _check_parameters(tensor.parameters, f"inputs[{index}].parameters")
        datatype, shape = declared
        if tensor.datatype != datatype:
            known = "" if tensor.datatype in DATATYPES else f" (there is no {tensor.datatype!r})"
            raise InvalidArgumentError(
                f"input {name!r} has datatype {tensor.datatype}{known}; the model takes {datatype}",
                field=f"inputs[{index}].datatype",
            )
        elements = check_shape(tensor.shape, shape, name, index)
        if datatype == "BYTES":
            strings += elements
            if strings > MAX_STRINGS:
                raise InvalidArgumentError(
                    f"input {name!r} has shape {[*tensor.shape]}; the strings of a request are {MAX_STRINGS} at most",
                    field=f"inputs[{index}].shape",
                )
    names.clear()
    for index, output in enumerate(request.outputs):
        name = output.name
        if name not in outputs:
            raise InvalidArgumentError(
                f"model {model!r} has no output {name!r}; it has {shown(outputs)}", field=f"outputs[{index}].name"
            )
        if name in names:
            raise InvalidArgumentError(f"output {name!r} is asked for twice", field=f"outputs[{index}].name")
        names.add(name)
        _check_parameters(output.parameters, f"outputs[{index}].parameters")


def check_shape(shape: Sequence[int], declared: Sequence[int], name: str, index: int) -> int:
    """Returns the number of elements. Raises InvalidArgumentError if the shape does not fit `declared`."""
    fits = len(shape) == len(declared) and all(
        given >= 0 and wanted in (-1, given) for given, wanted in zip(shape, declared, strict=True)
    )
    if not fits:
        more = f" and {len(shape) - _MOST_SHOWN} dimensions more" if len(shape) > _MOST_SHOWN else ""
        message = f"input {name!r} has shape {[*shape[:_MOST_SHOWN]]}{more}; "
        if min(shape[:_MOST_SHOWN], default=0) < 0:
            example = [1 if size < 0 else size for size in declared]
            message += f"the dimensions of a request are the sizes of its data, 0 or more, as in {example}; "
        message += f"the model takes {[*declared]}"
        if -1 in declared:
            message += ", where -1 stands for any size from 0"
        raise InvalidArgumentError(message, field=f"inputs[{index}].shape")
    elements = math.prod(shape)
    most, which = (_MAX_ELEMENTS, "") if elements else (_MAX_EMPTY, " other than 0")
    if math.prod(filter(None, shape)) > most:
        raise InvalidArgumentError(
            f"input {name!r} has shape {[*shape]}; its dimensions{which} may multiply to {most} at most",
            field=f"inputs[{index}].shape",
        )
    return elements


def whole_number(parameters: Mapping[str, v2.InferParameter], name: str, field: str) -> int:
    """Returns a parameter that is a whole number, 0 if it is not given. Raises InvalidArgumentError if it is none."""
    if name not in parameters:
        return 0
    given = parameters[name]
    kind = given.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param") or getattr(given, kind) < 0:
        raise InvalidArgumentError(
            f"{name} must be a whole number, 0 or more, in int64_param or uint64_param", field=field
        )
    return int(getattr(given, kind))


def shown(names: Collection[str]) -> str:
    return ", ".join([repr(name) for name in names])


def _check_parameters(parameters: Mapping[str, v2.InferParameter], field: str) -> None:
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidArgumentError(f"{field} has {len(parameters)} entries; at most {MAX_PARAMETERS}", field=field)
