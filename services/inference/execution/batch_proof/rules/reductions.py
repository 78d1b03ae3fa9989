"""Operators that combine elements along some axes: reductions, normalisations, sorts and cumulative sums."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor, as_size, plain
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    common_rows,
    from_front,
    not_along,
)
from services.inference.execution.batch_proof.registry import MICROSOFT, Outcome, rule
from services.inference.execution.batch_proof.sizes import ONE, Size, product


def without(shape: Shape, rows: RowAxis | None, axes: Collection[int], keep: bool) -> Tensor:
    """A tensor whose `axes`, along which no rows lie, are removed; with `keep`, they have size 1."""
    if keep:
        return Tensor(tuple(ONE if axis in axes else size for axis, size in enumerate(shape)), rows)
    moved = None if rows is None else rows.at(rows.axis - sum(axis < rows.axis for axis in axes))
    return Tensor(tuple(size for axis, size in enumerate(shape) if axis not in axes), moved)


@rule(
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    counts=True,
)
def reduction(call: OperatorCall) -> Outcome:
    """Reduces along axes; without axes, along all of them."""
    tensor = call.input(0)
    if tensor.counts_rows:
        return _counted(call, tensor)
    call.batch_independent(1)
    axes = call.integers(1) if call.maybe(1) is not None else call.attribute("axes")
    shape = call.shape(0)
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return Tensor(shape, tensor.rows)
        axes = range(len(shape))
    places = [from_front(axis, len(shape)) for axis in axes]
    not_along(tensor.rows, places, "reduces")
    made = without(shape, tensor.rows, places, bool(call.attribute("keepdims", 1)))
    if tensor.values is not None and call.operator == "ReduceProd" and len(places) == len(shape) == 1:
        return _counted(call, tensor)
    return made


def _counted(call: OperatorCall, tensor: Tensor) -> Tensor:
    """The product of a shape, that is, a number of elements."""
    values = tensor.values
    axes = call.integers(1) if call.maybe(1) is not None else call.attribute("axes")
    if call.operator != "ReduceProd" or values is None or values.ndim != 1 or list(axes or [0]) not in ([0], [-1]):
        raise NotProvenError("the number of rows becomes a value")
    if any(isinstance(value, float | bool) for value in values) or call.attribute("noop_with_empty_axes", 0):
        raise NotProvenError("the number of rows becomes a value")
    made = np.empty((1,) if call.attribute("keepdims", 1) else (), object)
    made.fill(plain(product(as_size(value) for value in values)))
    return Tensor(tuple(map(Size, made.shape)), values=made)


@rule("ArgMax", "ArgMin")
def arg_max(call: OperatorCall) -> Outcome:
    """Searches along one axis, by default the first."""
    shape = call.shape(0)
    axis = call.axis("axis", 0, len(shape))
    not_along(call.input(0).rows, [axis], "searches")
    made = without(shape, call.input(0).rows, [axis], bool(call.attribute("keepdims", 1)))
    return replace(made, below=shape[axis])


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: OperatorCall) -> Outcome:
    """Normalises over `axis`; before opset 13, over all axes from `axis` on."""
    shape, rows = call.shape(0), call.input(0).rows
    if call.opset >= 13:
        axes = range(axis := call.axis("axis", -1, len(shape)), axis + 1)
    else:
        axes = range(call.axis("axis", 1, len(shape)), len(shape))
    not_along(rows, axes, "normalises over")
    return Tensor(shape, rows)


@rule("LayerNormalization", "RMSNormalization")
@rule("SimplifiedLayerNormalization")
@rule("LayerNormalization", "SimplifiedLayerNormalization", domain=MICROSOFT)
def layer_normalization(call: OperatorCall) -> Outcome:
    """Normalises over all axes from `axis` on. Scale and bias are applied by broadcasting."""
    shape = call.shape(0)
    axis = call.axis("axis", -1, len(shape))
    not_along(call.input(0).rows, range(axis, len(shape)), "normalises over")
    rows = common_rows(call.given, len(shape))
    statistics = Tensor(tuple(ONE if place >= axis else size for place, size in enumerate(shape)), rows)
    return (Tensor(shape, rows), statistics, statistics)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(call: OperatorCall) -> Outcome:
    """Adds its inputs, and normalises the sum over the last axis."""
    shape = call.shape(0)
    not_along(call.input(0).rows, [len(shape) - 1], "normalises over")
    made = Tensor(shape, common_rows(call.given, len(shape)))
    return (made, None, None, made)


@rule("LpNormalization")
def lp_normalization(call: OperatorCall) -> Outcome:
    """Normalises along one axis, by default the last."""
    shape = call.shape(0)
    not_along(call.input(0).rows, [call.axis("axis", -1, len(shape))], "normalises over")
    return Tensor(shape, call.input(0).rows)


@rule("MeanVarianceNormalization")
def mean_variance_normalization(call: OperatorCall) -> Outcome:
    """Normalises over axes, by default all except the second."""
    shape = call.shape(0)
    axes = [from_front(axis, len(shape)) for axis in call.attribute("axes", (0, 2, 3))]
    not_along(call.input(0).rows, axes, "normalises over")
    return Tensor(shape, call.input(0).rows)


@rule("BatchNormalization")
def batch_normalization(call: OperatorCall) -> Outcome:
    """Normalises by statistics in the graph along axis 1, except in training mode."""
    if call.attribute("training_mode", 0) or call.outputs > 1:
        raise NotProvenError("in training mode it normalises over axis 0")
    call.batch_independent_except(0)
    not_along(call.input(0).rows, [1], "scales")
    return Tensor(call.shape(0), call.input(0).rows)


@rule("InstanceNormalization", "GroupNormalization", "LRN")
@rule("GroupNorm", domain=MICROSOFT)
def inner_normalization(call: OperatorCall) -> Outcome:
    """Normalises over channels or positions, separately for each element of axis 0."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    not_along(call.input(0).rows, range(1, len(shape)), "normalises or scales along")
    return Tensor(shape, call.input(0).rows)


@rule("CumSum", "CumProd")
def cumulative_sum(call: OperatorCall) -> Outcome:
    """Accumulates along the axis that the second input gives."""
    shape = call.shape(0)
    axes = call.integers(1) or [0]
    not_along(call.input(0).rows, [from_front(axes[0], len(shape))], "sums along")
    return Tensor(shape, call.input(0).rows)


@rule("TopK")
def top_k(call: OperatorCall) -> Outcome:
    """Selects along one axis, by default the last."""
    call.batch_independent(1)
    shape = call.shape(0)
    axis = call.axis("axis", -1, len(shape))
    not_along(call.input(0).rows, [axis], "sorts")
    values = call.input(1).values
    count = call.fresh() if values is None else as_size(values.flat[0])
    made = Tensor((*shape[:axis], count if count.nonnegative else call.fresh(), *shape[axis + 1 :]), call.input(0).rows)
    return (made, made)


@rule("Trilu")
@rule("Trilu", domain=MICROSOFT)
def trilu(call: OperatorCall) -> Outcome:
    """Keeps a triangle of the last two axes."""
    call.batch_independent(1)
    shape = call.shape(0)
    not_along(call.input(0).rows, range(len(shape) - 2, len(shape)), "takes a triangle of")
    return Tensor(shape, call.input(0).rows)


@rule("Det")
def determinant(call: OperatorCall) -> Outcome:
    """The determinant over the last two axes."""
    shape = call.shape(0)
    axes = range(len(shape) - 2, len(shape))
    not_along(call.input(0).rows, axes, "reduces")
    return without(shape, call.input(0).rows, axes, keep=False)


@rule("OneHot")
def one_hot(call: OperatorCall) -> Outcome:
    """Inserts an axis, by default the last."""
    call.batch_independent(1, 2)
    shape, rows = call.shape(0), call.input(0).rows
    axis = call.axis("axis", -1, len(shape) + 1)
    depth = call.input(1).values
    size = call.fresh() if depth is None or not as_size(depth.flat[0]).nonnegative else as_size(depth.flat[0])
    moved = None if rows is None else rows.at(rows.axis + (axis <= rows.axis))
    return Tensor((*shape[:axis], size, *shape[axis:]), moved)


@rule("DFT")
def dft(call: OperatorCall) -> Outcome:
    """Transforms along one axis. The last axis holds real and imaginary parts."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    if call.opset >= 20:
        axis = from_front((call.integers(2) or [-2])[0], len(shape))
    else:
        axis = call.axis("axis", 1, len(shape))
    not_along(call.input(0).rows, [axis, len(shape) - 1], "transforms")
    return Tensor(
        (*(call.fresh() if place == axis else size for place, size in enumerate(shape[:-1])), Size(2)),
        call.input(0).rows,
    )


@rule("STFT")
def stft(call: OperatorCall) -> Outcome:
    """Transforms each of the signals, which lie along axis 0."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    not_along(call.input(0).rows, range(1, len(shape)), "transforms")
    return Tensor((shape[0], call.fresh(), call.fresh(), Size(2)), call.input(0).rows)
