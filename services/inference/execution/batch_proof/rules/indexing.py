"""Operators that read or write by index."""

from __future__ import annotations

import numpy as np

from services.inference.execution.batch_proof.abstract_value import Content, RowAxis, Tensor, known
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall, from_front, not_along
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import ONE, Size, product

_BY_POSITION = "it selects by the number of the row"


@rule("Gather", counts=True, positions=True)
def gather(call: OperatorCall) -> Outcome:
    """Selects from a table by the indices of each row, or from the rows by indices along another axis."""
    data, indices = call.input(0), call.input(1)
    shape, chosen = call.shape(0), call.shape(1)
    axis = call.axis(0)
    if indices.counts_rows or data.content is not Content.OWN:
        raise NotProvenError("the number of rows becomes a value")
    concrete = indices.values is not None and not any(isinstance(one, Size) for one in indices.values.flat)
    if data.counts_rows or (data.values is not None and concrete):
        return _taken(call, axis)
    made = (*shape[:axis], *chosen, *shape[axis + 1 :])
    if indices.content is Content.POSITION_IN_ALL:
        if data.rows != RowAxis(0, inner=indices.stride) or axis != 0:
            raise NotProvenError(_BY_POSITION)
        return Tensor(made, indices.rows)
    if indices.content is not Content.OWN:
        # Each row may select only itself.
        own = indices.content is Content.POSITION and indices.stride == ONE and indices.rows == RowAxis(0)
        if not own or data.rows != RowAxis(0) or axis != 0 or len(chosen) != 1:
            raise NotProvenError(_BY_POSITION)
        return Tensor(made, data.rows)
    not_along(data.rows, [axis], "selects along")
    if data.rows is not None and indices.rows is not None:
        raise NotProvenError("it selects from each row by the indices of all rows")
    if data.rows is not None:
        return Tensor(made, data.rows.at(data.rows.axis + (len(chosen) - 1 if data.rows.axis > axis else 0)))
    return Tensor(made, None if indices.rows is None else indices.rows.at(axis + indices.rows.axis))


def _taken(call: OperatorCall, axis: int) -> Tensor:
    values, wanted = call.input(0).values, call.integers(1)
    if values is None or wanted is None or any(not -values.shape[axis] <= one < values.shape[axis] for one in wanted):
        raise NotProvenError("it selects from the shape of the batch by indices that are not known")
    chosen = np.asarray(wanted, int).reshape([size.coefficient for size in call.shape(1)])
    taken = np.empty((*values.shape[:axis], *chosen.shape, *values.shape[axis + 1 :]), object)
    taken[...] = values.take(chosen, axis)
    return known(taken)


def _same_rows(*tensors: Tensor) -> RowAxis | None:
    if any(tensor.rows != tensors[0].rows for tensor in tensors):
        raise NotProvenError("its inputs do not have their rows along the same axis")
    return tensors[0].rows


@rule("GatherElements")
def gather_elements(call: OperatorCall) -> Outcome:
    """Selects from each row by its own indices, or from a table."""
    data, indices, shape = call.input(0), call.input(1), call.shape(1)
    axis = from_front(int(call.attribute("axis", 0)), len(shape))
    if data.rows is None and indices.rows is not None and indices.rows.axis == axis:
        return Tensor(shape, indices.rows)
    rows = _same_rows(data, indices)
    not_along(rows, [axis], "selects along")
    return Tensor(shape, rows)


@rule("GatherND", positions=True)
def gather_nd(call: OperatorCall) -> Outcome:
    """Selects from a table by the indices of each row, or from each row by its own indices."""
    data, indices = call.input(0), call.input(1)
    shape, chosen = call.shape(0), call.shape(1)
    batch = int(call.attribute("batch_dims", 0))
    depth = chosen[-1].known
    if depth is None or depth > len(shape) - batch or data.content is not Content.OWN:
        raise NotProvenError("the length of its indices is not known")
    if shape[:batch] != chosen[:batch]:
        raise NotProvenError("its inputs differ in their first axes")
    made = (*chosen[:-1], *shape[batch + depth :])
    rows = indices.rows
    if rows is not None and rows.axis == len(chosen) - 1:
        raise NotProvenError(f"an index is taken from several rows along axis {rows.axis}")
    if indices.content is not Content.OWN:
        first = Content.POSITION_FIRST if depth > 1 else Content.POSITION
        if batch or data.rows != RowAxis(0) or rows is None or indices.content is not first or indices.stride != ONE:
            raise NotProvenError(_BY_POSITION)
        if rows.outer != ONE or rows.inner != ONE:
            raise NotProvenError(_BY_POSITION)
        return Tensor(made, rows)
    if data.rows is None:
        if rows is not None and rows.axis < batch:
            raise NotProvenError("it selects from a table by the number of the row")
        return Tensor(made, rows)
    if rows is not None or data.rows.axis < batch:
        if data.rows.axis >= batch:
            raise NotProvenError(f"it selects along axis {data.rows.axis}, along which the rows lie")
        return Tensor(made, _same_rows(data, indices))
    not_along(data.rows, range(batch, batch + depth), "selects along")
    return Tensor(made, data.rows.at(data.rows.axis - depth + len(chosen) - 1 - batch))


@rule("ScatterElements", "Scatter")
def scatter_elements(call: OperatorCall) -> Outcome:
    _same_rows(*[call.input(index) for index in range(3)])
    return call.keeping([call.axis(0)], "writes along")


@rule("ScatterND")
def scatter_nd(call: OperatorCall) -> Outcome:
    """Writes by index along the first axes. The rows must not lie along these."""
    chosen = call.shape(1)
    depth = chosen[-1].known
    call.batch_independent(1)
    updates = call.input(2)
    if depth is None:
        raise NotProvenError("the length of its indices is not known")
    if call.rows is None or updates.rows is None:
        call.batch_independent_except(0)
        if call.rows is None:
            call.batch_independent(0)
            return call.keeping((), "")
        # The same values would be written into all rows, at places along other axes.
        raise NotProvenError("it writes values without rows into rows")
    made = call.keeping(range(depth), "writes along")
    if updates.rows != call.rows.at(call.rows.axis - depth + len(chosen) - 1):
        raise NotProvenError("what it writes has its rows along another axis")
    return made


@rule("ai.onnx.ml.ArrayFeatureExtractor")
def array_feature_extractor(call: OperatorCall) -> Outcome:
    shape, chosen, rows = call.shape(0), call.shape(1), call.input(1).rows
    count = product(chosen)
    if len(shape) == 1 and call.rows is None and rows is not None:
        outer = product(chosen[: rows.axis]) * rows.outer
        inner = rows.inner * product(chosen[rows.axis + 1 :])
        return Tensor((ONE, count), RowAxis(1, outer, inner))
    call.batch_independent(1)
    call.not_along([len(shape) - 1], "selects along")
    return Tensor((*(shape[:-1] or (ONE,)), count), call.rows)
