"""Operators that read or write by index."""

from __future__ import annotations

import numpy as np

from services.inference.execution.batch_proof.abstract_value import Content, RowAxis, Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall, not_along
from services.inference.execution.batch_proof.registry import ML, Outcome, rule
from services.inference.execution.batch_proof.rules.layout import made_of
from services.inference.execution.batch_proof.sizes import ONE, Size, product


@rule("Gather", counts=True, positions=True)
def gather(call: OperatorCall) -> Outcome:
    """Selects from a table by the indices of each row, or from the rows by indices along another axis."""
    data, indices = call.input(0), call.input(1)
    shape, places = call.shape(0), call.shape(1)
    axis = call.axis("axis", 0, len(shape))
    if indices.counts_rows or data.content is not Content.OWN:
        raise NotProvenError("the number of rows becomes a value")
    concrete = indices.values is not None and not any(isinstance(one, Size) for one in indices.values.flat)
    if data.counts_rows or (data.values is not None and concrete):
        return made_of(_taken(call, axis))
    made = (*shape[:axis], *places, *shape[axis + 1 :])
    if indices.content is Content.POSITION_IN_ALL:
        if data.rows != RowAxis(0, inner=indices.stride) or axis != 0:
            raise NotProvenError("it selects by the number of the row")
        return Tensor(made, indices.rows)
    if indices.content is not Content.OWN:
        # Each row may select only itself.
        if (
            indices.content is not Content.POSITION
            or indices.stride != ONE
            or data.rows != RowAxis(0)
            or axis != 0
            or indices.rows != RowAxis(0)
            or len(places) != 1
        ):
            raise NotProvenError("it selects by the number of the row")
        return Tensor(made, data.rows)
    not_along(data.rows, [axis], "selects along")
    if data.rows is not None and indices.rows is not None:
        raise NotProvenError("it selects from each row by the indices of all rows")
    if data.rows is not None:
        return Tensor(made, data.rows.at(data.rows.axis + (len(places) - 1 if data.rows.axis > axis else 0)))
    return Tensor(made, None if indices.rows is None else indices.rows.at(axis + indices.rows.axis))


def _taken(call: OperatorCall, axis: int) -> np.ndarray[tuple[int, ...], np.dtype[np.object_]]:
    values = call.input(0).values
    wanted = call.integers(1)
    if values is None or wanted is None or any(not -values.shape[axis] <= one < values.shape[axis] for one in wanted):
        raise NotProvenError("it selects from the shape of the batch by indices that are not known")
    chosen = np.asarray(wanted, int).reshape([size.coefficient for size in call.shape(1)])
    taken = np.empty((*values.shape[:axis], *chosen.shape, *values.shape[axis + 1 :]), object)
    taken[...] = values.take(chosen, axis)
    return taken


def _same_rows(tensors: list[Tensor]) -> RowAxis | None:
    if any(tensor.rows != tensors[0].rows for tensor in tensors):
        raise NotProvenError("its inputs do not have their rows along the same axis")
    return tensors[0].rows


@rule("GatherElements")
def gather_elements(call: OperatorCall) -> Outcome:
    """Selects from each row by its own indices, or from a table."""
    data, indices = call.input(0), call.input(1)
    shape = call.shape(1)
    axis = call.axis("axis", 0, len(shape))
    if data.rows is None and indices.rows is not None and indices.rows.axis == axis:
        return Tensor(shape, indices.rows)
    rows = _same_rows([data, indices])
    not_along(rows, [axis], "selects along")
    return Tensor(shape, rows)


@rule("GatherND", positions=True)
def gather_nd(call: OperatorCall) -> Outcome:
    """Selects from a table by the indices of each row, or from each row by its own indices."""
    data, indices = call.input(0), call.input(1)
    shape, places = call.shape(0), call.shape(1)
    batch = int(call.attribute("batch_dims", 0))
    depth = places[-1].known
    if depth is None or depth > len(shape) - batch or data.content is not Content.OWN:
        raise NotProvenError("the length of its indices is not known")
    if shape[:batch] != places[:batch]:
        raise NotProvenError("its inputs differ in their first axes")
    made = (*places[:-1], *shape[batch + depth :])
    rows = indices.rows
    if rows is not None and rows.axis == len(places) - 1:
        raise NotProvenError(f"an index is taken from several rows along axis {rows.axis}")
    if indices.content is not Content.OWN:
        first = Content.POSITION_FIRST if depth > 1 else Content.POSITION
        if batch or data.rows != RowAxis(0) or rows is None or indices.content is not first or indices.stride != ONE:
            raise NotProvenError("it selects by the number of the row")
        if rows.outer != ONE or rows.inner != ONE:
            raise NotProvenError("it selects by the number of the row")
        return Tensor(made, rows)
    if data.rows is None:
        if rows is not None and rows.axis < batch:
            raise NotProvenError("it selects from a table by the number of the row")
        return Tensor(made, rows)
    if rows is not None or data.rows.axis < batch:
        if data.rows.axis >= batch:
            raise NotProvenError(f"it selects along axis {data.rows.axis}, along which the rows lie")
        return Tensor(made, _same_rows([data, indices]))
    not_along(data.rows, range(batch, batch + depth), "selects along")
    return Tensor(made, data.rows.at(data.rows.axis - depth + len(places) - 1 - batch))


@rule("ScatterElements", "Scatter")
def scatter_elements(call: OperatorCall) -> Outcome:
    """Writes into each row by its own indices."""
    shape = call.shape(0)
    rows = _same_rows([call.input(place) for place in range(3)])
    not_along(rows, [call.axis("axis", 0, len(shape))], "writes along")
    return Tensor(shape, rows)


@rule("ScatterND")
def scatter_nd(call: OperatorCall) -> Outcome:
    """Writes by index along the first axes. The rows must not lie along these."""
    shape, places = call.shape(0), call.shape(1)
    depth = places[-1].known
    call.batch_independent(1)
    data, updates = call.input(0), call.input(2)
    if depth is None:
        raise NotProvenError("the length of its indices is not known")
    if data.rows is None or updates.rows is None:
        call.batch_independent_except(0)
        if data.rows is None:
            call.batch_independent(0)
            return Tensor(shape)
        # The same values would be written into all rows, at places along other axes.
        raise NotProvenError("it writes values without rows into rows")
    not_along(data.rows, range(depth), "writes along")
    if updates.rows != data.rows.at(data.rows.axis - depth + len(places) - 1):
        raise NotProvenError("what it writes has its rows along another axis")
    return Tensor(shape, data.rows)


@rule("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(call: OperatorCall) -> Outcome:
    """Selects along the last axis."""
    data, indices = call.input(0), call.input(1)
    shape, places = call.shape(0), call.shape(1)
    count = product(places)
    if len(shape) == 1 and data.rows is None and indices.rows is not None:
        rows = indices.rows
        outer = product(places[: rows.axis]) * rows.outer
        inner = rows.inner * product(places[rows.axis + 1 :])
        return Tensor((ONE, count), RowAxis(1, outer, inner))
    call.batch_independent(1)
    not_along(data.rows, [len(shape) - 1], "selects along")
    return Tensor((*(shape[:-1] or (ONE,)), count), data.rows)
