"""Operators that combine elements along some axes: reductions, normalisations, sorts and cumulative sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.inference.execution.batch_proof.abstract_value import Tensor, as_size, known, plain
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    common_rows,
    from_front,
    not_along,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.reshaping import inserted, without
from services.inference.execution.batch_proof.sizes import Size, product


@rule("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", counts=True)
@rule("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", counts=True)
def reduction(call: OperatorCall) -> Outcome:
    tensor = call.input(0)
    if tensor.counts_rows:
        return _counted(call, tensor)
    call.batch_independent(1)
    axes = call.axes()
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return call.keeping((), "")
        axes = range(call.rank)
    axes = call.from_front(axes)
    not_along(tensor.rows, axes, "reduces")
    if tensor.values is not None and call.operator == "ReduceProd" and len(axes) == call.rank == 1:
        return _counted(call, tensor)
    return without(call.shape(0), tensor.rows, axes, keep=bool(call.attribute("keepdims", 1)))


def _counted(call: OperatorCall, tensor: Tensor) -> Tensor:
    """The product of a shape, that is, a number of elements."""
    values = tensor.values
    if (
        call.operator != "ReduceProd"
        or values is None
        or values.ndim != 1
        or list(call.axes() or [0]) not in ([0], [-1])
    ):
        raise NotProvenError("the number of rows becomes a value")
    if any(isinstance(value, float | bool) for value in values) or call.attribute("noop_with_empty_axes", 0):
        raise NotProvenError("the number of rows becomes a value")
    made = np.empty((1,) if call.attribute("keepdims", 1) else (), object)
    made.fill(plain(product(map(as_size, values))))
    return known(made)


@rule("ArgMax", "ArgMin")
def arg_max(call: OperatorCall) -> Outcome:
    axis = call.axis(0)
    call.not_along([axis], "searches")
    made = without(call.shape(0), call.rows, [axis], keep=bool(call.attribute("keepdims", 1)))
    return replace(made, below=call.shape(0)[axis])


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: OperatorCall) -> Outcome:
    if call.opset >= 13:
        return call.keeping([call.axis(-1)], "normalises over")
    return call.keeping(range(call.axis(1), call.rank), "normalises over")


@rule("com.microsoft.QLinearSoftmax")
def qlinear_softmax(call: OperatorCall) -> Outcome:
    """As Softmax of the version in the attribute `opset`."""
    call.batch_independent_except(0)
    axis = call.axis(-1)
    return call.keeping(range(axis, axis + 1 if call.attribute("opset", 0) >= 13 else call.rank), "normalises over")


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@rule("com.microsoft.LayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
def layer_normalization(call: OperatorCall) -> Outcome:
    """Normalises over all axes from `axis` on. Scale and bias are applied by broadcasting."""
    shape, axis = call.shape(0), call.axis(-1)
    call.not_along(range(axis, len(shape)), "normalises over")
    rows = common_rows(call.given, len(shape))
    statistics = without(shape, rows, range(axis, len(shape)), keep=True)
    return (Tensor(shape, rows), statistics, statistics)


@rule("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
def skip_layer_normalization(call: OperatorCall) -> Outcome:
    """Adds its inputs, and normalises the sum over the last axis."""
    call.not_along([call.rank - 1], "normalises over")
    made = Tensor(call.shape(0), common_rows(call.given, call.rank))
    return (made, None, None, made)


@rule("LpNormalization")
def lp_normalization(call: OperatorCall) -> Outcome:
    return call.keeping([call.axis(-1)], "normalises over")


@rule("MeanVarianceNormalization")
def mean_variance_normalization(call: OperatorCall) -> Outcome:
    axes = call.from_front(call.attribute("axes", (0, 2, 3)))
    return call.keeping(axes, "normalises over")


@rule("BatchNormalization")
def batch_normalization(call: OperatorCall) -> Outcome:
    """Normalises by statistics in the graph along axis 1, except in training mode."""
    if call.attribute("training_mode", 0) or call.outputs > 1:
        raise NotProvenError("in training mode it normalises over axis 0")
    call.batch_independent_except(0)
    return call.keeping([1], "scales")


@rule("InstanceNormalization", "GroupNormalization", "LRN", "com.microsoft.GroupNorm")
def inner_normalization(call: OperatorCall) -> Outcome:
    """Normalises over channels or positions, separately for each element of axis 0."""
    call.batch_independent_except(0)
    return call.keeping(range(1, call.rank), "normalises or scales along")


@rule("CumSum", "CumProd")
def cumulative_sum(call: OperatorCall) -> Outcome:
    axes = call.integers(1) or [0]
    return call.keeping(call.from_front(axes[:1]), "sums along")


@rule("TopK")
def top_k(call: OperatorCall) -> Outcome:
    call.batch_independent(1)
    shape, axis = call.shape(0), call.axis(-1)
    call.not_along([axis], "sorts")
    values = call.input(1).values
    count = call.fresh() if values is None else call.size(as_size(values.flat[0]))
    made = Tensor((*shape[:axis], count, *shape[axis + 1 :]), call.rows)
    return (made, made)


@rule("Trilu", "com.microsoft.Trilu")
def trilu(call: OperatorCall) -> Outcome:
    call.batch_independent(1)
    return call.keeping(range(call.rank - 2, call.rank), "takes a triangle of")


@rule("Det")
def determinant(call: OperatorCall) -> Outcome:
    axes = range(call.rank - 2, call.rank)
    call.not_along(axes, "reduces")
    return without(call.shape(0), call.rows, axes)


@rule("OneHot")
def one_hot(call: OperatorCall) -> Outcome:
    call.batch_independent(1, 2)
    shape = call.shape(0)
    axis = from_front(int(call.attribute("axis", -1)), len(shape) + 1)
    depth = call.input(1).values
    size = call.fresh() if depth is None else call.size(as_size(depth.flat[0]))
    return inserted(call.input(0), shape, axis, size)


@rule("DFT")
def dft(call: OperatorCall) -> Outcome:
    """Transforms along one axis. The last axis holds real and imaginary parts."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    axis = call.from_front((call.integers(2) or [-2])[:1])[0] if call.opset >= 20 else call.axis(1)
    call.not_along([axis, len(shape) - 1], "transforms")
    sizes = [call.fresh() if other == axis else size for other, size in enumerate(shape[:-1])]
    return Tensor((*sizes, Size(2)), call.rows)


@rule("STFT")
def stft(call: OperatorCall) -> Outcome:
    """Transforms each of the signals, which lie along axis 0."""
    call.batch_independent_except(0)
    call.not_along(range(1, call.rank), "transforms")
    return Tensor((call.shape(0)[0], call.fresh(), call.fresh(), Size(2)), call.rows)


@rule("EyeLike", "NonZero", "Unique", "NonMaxSuppression", "StringSplit", "DynamicQuantizeLinear")
@rule("com.microsoft.DynamicQuantizeMatMul", "com.microsoft.DynamicQuantizeLSTM", "com.microsoft.Tokenizer")
def over_all(call: OperatorCall) -> Outcome:
    """Operators whose results depend on the whole tensor."""
    scale, pads = "its scale is computed over all rows", "it pads all rows to the longest"
    reasons = {
        "EyeLike": "its elements depend on the number of their row",
        "NonZero": "how many elements it finds, and their order, depends on all rows",
        "Unique": "it compares all rows",
        "NonMaxSuppression": "how many boxes it selects depends on all rows",
        "StringSplit": pads,
        "Tokenizer": pads,
    }
    raise NotProvenError(reasons.get(call.operator, scale))
