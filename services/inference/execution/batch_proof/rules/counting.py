"""Operators that make shapes, constants and ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from services.inference.execution.batch_proof.abstract_value import Content, RowAxis, Tensor, as_size, known, plain
from services.inference.execution.batch_proof.arithmetic import MOST_ELEMENTS, number
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.reshaping import grown_rows
from services.inference.execution.batch_proof.rules.layout import numbers
from services.inference.execution.batch_proof.sizes import ROWS, Size, Symbols, product

_COMPUTED = frozenset({TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE})


def constant(proto: Any, symbols: Symbols) -> Tensor:
    """The tensor of a TensorProto. Its values are left out if it is large or in another file."""
    shape = tuple(map(Size, proto.dims))
    external = proto.data_location == proto.EXTERNAL
    if product(shape).coefficient > MOST_ELEMENTS or external or proto.data_type not in _COMPUTED:
        return Tensor(shape)
    return _elements(numpy_helper.to_array(proto), symbols)


def _elements(array: Any, symbols: Symbols) -> Tensor:
    made = np.empty(np.shape(array), object)
    for index in np.ndindex(made.shape):
        made[index] = number(np.asarray(array)[index], symbols)
    return known(made)


@rule("Constant")
def constant_node(call: OperatorCall) -> Outcome:
    ((name, value),) = call.attributes.items()
    if name == "value":
        return constant(value, call.symbols)
    if name in ("value_int", "value_ints", "value_float", "value_floats"):
        return _elements(value, call.symbols)
    if name in ("value_string", "value_strings"):
        return Tensor(() if name == "value_string" else (Size(len(value)),))
    return Tensor(None)


@rule("Shape", counts=True, positions=True)
def shape_(call: OperatorCall) -> Outcome:
    """The sizes as values. The size of the row axis contains B."""
    sizes = call.shape(0)[slice(call.attribute("start", 0), call.attribute("end"))]
    made = np.empty(len(sizes), object)
    made[:] = [plain(size) for size in sizes]
    return known(made)


@rule("Size", counts=True, positions=True)
def size_(call: OperatorCall) -> Outcome:
    return known(plain(product(call.shape(0))))


@rule("ConstantOfShape", counts=True)
def constant_of_shape(call: OperatorCall) -> Outcome:
    """All elements have one value. An axis whose size contains B is the row axis."""
    sizes = [as_size(one) for one in numbers(call, 0)]
    sizes = [size if size.nonnegative else call.symbols.size(("extent", size)) for size in sizes]
    counting = [axis for axis, size in enumerate(sizes) if size.counts_rows]
    if len(counting) > 1:
        raise NotProvenError("its size grows with the square of the number of rows")
    if counting:
        return Tensor(tuple(sizes), grown_rows(counting[0], sizes[counting[0]]))
    total = product(sizes).known
    proto = call.attribute("value")
    fill = known(0.0).values if proto is None else constant(proto, call.symbols).values
    if total is None or total > MOST_ELEMENTS or fill is None:
        return Tensor(tuple(sizes))
    values = np.empty([size.coefficient for size in sizes], object)
    values.fill(fill.flat[0])
    # The shape may hold symbols beside a 0.
    return Tensor(tuple(sizes), values=values)


@rule("Range", counts=True)
def range_(call: OperatorCall) -> Outcome:
    """A range from 0 to the number of rows holds the number of each row."""
    if any(tensor.rows is not None for tensor in call.given):
        raise NotProvenError("its length depends on the rows")
    start, limit, step = (plain(numbers(call, index).reshape(-1)[0]) for index in range(3))
    from_zero = start == 0 and step == 1
    if limit == ROWS and from_zero:
        return Tensor((ROWS,), RowAxis(0), content=Content.POSITION)
    if not all(tensor.independent for tensor in call.given):
        raise NotProvenError("the number of rows becomes a value")
    if isinstance(limit, Size) and limit.nonnegative and from_zero:
        return Tensor((limit,), below=limit)
    if all(isinstance(one, int) for one in (start, limit, step)) and step:
        values = list(range(start, limit, step))
        if 0 < len(values) <= MOST_ELEMENTS:
            return known(values)
        return Tensor((Size(len(values)),), below=Size(limit) if from_zero else None)
    return Tensor((call.symbols.size(("range", start, limit, step)),))
