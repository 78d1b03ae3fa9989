"""Operators that make shapes, constants and ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from services.inference.execution.batch_proof.abstract_value import (
    Content,
    RowAxis,
    Shape,
    Tensor,
    as_size,
    known,
    plain,
)
from services.inference.execution.batch_proof.arithmetic import MOST_ELEMENTS, number
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.rules.layout import numbers
from services.inference.execution.batch_proof.sizes import ROWS, Size, Symbols, product


def constant(proto: Any, symbols: Symbols) -> Tensor:
    """The tensor of a TensorProto. Its values are left out if it is large or in another file."""
    shape = tuple(map(Size, proto.dims))
    count = product(shape).coefficient
    external = proto.data_location == proto.EXTERNAL
    if count > MOST_ELEMENTS or external or proto.data_type not in _COMPUTED:
        return Tensor(shape)
    array = numpy_helper.to_array(proto)
    values = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        values[index] = number(array[index], symbols)
    return Tensor(shape, values=values)


# FLOAT, INT32, INT64, BOOL, DOUBLE
_COMPUTED = frozenset({1, 6, 7, 9, 11})


@rule("Constant")
def constant_node(call: OperatorCall) -> Outcome:
    """A constant from the attribute that is set."""
    ((name, value),) = call.attributes.items()
    if name == "value":
        return constant(value, call.symbols)
    if name in ("value_int", "value_ints", "value_float", "value_floats"):
        array = np.asarray(value)
        made = np.empty(array.shape, object)
        for index in np.ndindex(array.shape):
            made[index] = number(array[index], call.symbols)
        return Tensor(tuple(map(Size, array.shape)), values=made)
    if name in ("value_string", "value_strings"):
        return Tensor(() if name == "value_string" else (Size(len(value)),))
    return Tensor(None)


@rule("Shape", counts=True, positions=True)
def shape_(call: OperatorCall) -> Outcome:
    """The sizes as values. The size of the row axis contains B."""
    sizes = call.shape(0)
    part = slice(call.attribute("start", 0), call.attribute("end"))
    made = np.empty(len(sizes[part]), object)
    made[:] = [plain(size) for size in sizes[part]]
    return Tensor((Size(len(made)),), values=made)


@rule("Size", counts=True, positions=True)
def size_(call: OperatorCall) -> Outcome:
    """The product of the sizes."""
    return known(plain(product(call.shape(0))))


@rule("ConstantOfShape", counts=True)
def constant_of_shape(call: OperatorCall) -> Outcome:
    """All elements have one value."""
    sizes = [as_size(one) for one in numbers(call, 0)]
    sizes = [size if size.nonnegative else call.symbols.size(("extent", size)) for size in sizes]
    made = Tensor(tuple(sizes), uniform_rows(tuple(sizes)))
    total = product(sizes).known
    if total is None or total > MOST_ELEMENTS:
        return made
    proto = call.attribute("value")
    fill = 0.0 if proto is None else constant(proto, call.symbols).values
    if fill is None:
        return made
    values = np.empty([size.coefficient for size in sizes], object)
    values.fill(fill if isinstance(fill, float) else fill.flat[0])
    return Tensor(tuple(sizes), values=values)


def uniform_rows(sizes: Shape) -> RowAxis | None:
    """The place of the rows in a tensor of equal elements. Raises NotProvenError if two sizes count the rows."""
    counting = [axis for axis, size in enumerate(sizes) if size.counts_rows]
    if not counting:
        return None
    axis = counting[0]
    inner = sizes[axis].divided_by(ROWS)
    if len(counting) > 1 or inner is None or inner.counts_rows:
        raise NotProvenError("its size grows with the square of the number of rows")
    return RowAxis(axis, inner=inner)


@rule("Range", counts=True)
def range_(call: OperatorCall) -> Outcome:
    """A range from 0 to the number of rows holds the number of each row."""
    if any(tensor.rows is not None for tensor in call.given):
        raise NotProvenError("its length depends on the rows")
    start, limit, step = (plain(numbers(call, place).reshape(-1)[0]) for place in range(3))
    if limit == ROWS and start == 0 and step == 1:
        return Tensor((ROWS,), RowAxis(0), content=Content.POSITION)
    if not all(tensor.independent for tensor in call.given):
        raise NotProvenError("the number of rows becomes a value")
    if isinstance(limit, Size) and limit.nonnegative and start == 0 and step == 1:
        return Tensor((limit,), below=limit)
    if all(isinstance(one, int) for one in (start, limit, step)) and step:
        values = list(range(start, limit, step))
        if 0 < len(values) <= MOST_ELEMENTS:
            return known(values)
        return Tensor((Size(len(values)),), below=Size(limit) if start == 0 and step == 1 else None)
    return Tensor((call.symbols.size(("range", start, limit, step)),))
