"""Convolutions, pools and other operators on the spatial axes of images and signals."""

from __future__ import annotations

from collections.abc import Sequence

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor, as_size, plain
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    common_rows,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.rules.layout import numbers
from services.inference.execution.batch_proof.sizes import ONE, Size


def _check_channels_first(call: OperatorCall) -> None:
    if call.attribute("channels_last", 0):
        raise NotProvenError("there is no rule for it")


@rule("Conv", "ConvInteger", "ConvTranspose", "QLinearConv", "com.microsoft.FusedConv", "com.microsoft.QLinearConv")
def convolution(call: OperatorCall) -> Outcome:
    _check_channels_first(call)
    summand = 3 if call.operator == "FusedConv" else -1
    call.batch_independent_except(0, summand)
    shape = call.shape(0)
    call.not_along(range(1, len(shape)), "sums over")
    weights = call.shape(3 if call.operator == "QLinearConv" else 1)
    if call.operator == "ConvTranspose":
        channels = weights[1] * Size(int(call.attribute("group", 1)))
        spatial = [call.fresh() for _ in shape[2:]]
    else:
        channels = weights[0]
        spatial = _slid(call, shape[2:], [size.known for size in weights[2:]])
    made = Tensor((shape[0], channels, *spatial), call.rows)
    added = call.maybe(summand) if summand > 0 else None
    return made if added is None else Tensor(made.shape, common_rows([made, added], len(shape)))


def _slid(call: OperatorCall, spatial: Shape, kernel: Sequence[int | None]) -> list[Size]:
    """The sizes of the spatial axes after a window has slid along them."""
    count = len(spatial)
    strides = list(call.attribute("strides", [1] * count))
    dilations = list(call.attribute("dilations", [1] * count))
    pads = list(call.attribute("pads", [0] * 2 * count))
    auto = call.attribute("auto_pad", b"NOTSET")
    sizes = []
    for index, size in enumerate(spatial):
        whole, width, stride = size.known, kernel[index], strides[index]
        if whole is None or width is None or auto not in (b"NOTSET", b"VALID") or call.attribute("ceil_mode", 0):
            sizes.append(call.fresh())
            continue
        padding = 0 if auto == b"VALID" else pads[index] + pads[index + count]
        sizes.append(Size((whole + padding - dilations[index] * (width - 1) - 1) // stride + 1))
    return sizes


@rule("MaxPool", "AveragePool", "LpPool", "com.microsoft.QLinearAveragePool")
def pool(call: OperatorCall) -> Outcome:
    """Pools over spatial axes. The second output, indices of the maxima, counts through the whole tensor."""
    return (_pooled(call, _slid(call, call.shape(0)[2:], list(call.attribute("kernel_shape")))), None)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "com.microsoft.QLinearGlobalAveragePool")
def global_pool(call: OperatorCall) -> Outcome:
    return _pooled(call, [ONE] * len(call.shape(0)[2:]))


def _pooled(call: OperatorCall, spatial: Sequence[Size]) -> Tensor:
    call.batch_independent_except(0)
    _check_channels_first(call)
    call.not_along(range(2, call.rank), "pools along")
    return Tensor((*call.shape(0)[:2], *spatial), call.rows)


_COORDINATES = (b"half_pixel", b"pytorch_half_pixel", b"align_corners", b"asymmetric", b"half_pixel_symmetric")


@rule("Resize", "Upsample", counts=True)
def resize(call: OperatorCall) -> Outcome:
    """Resizes by scales or to sizes. The row axis must keep its size."""
    data, shape = call.input(0), call.shape(0)
    if data.counts_rows or call.attribute("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise NotProvenError("there is no rule for it")
    if call.attribute("coordinate_transformation_mode", b"half_pixel") not in _COORDINATES:
        raise NotProvenError("it may select along the axis of the rows")
    if call.attribute("mode", b"nearest") != b"nearest" and (len(shape) < 4 or (data.rows and data.rows.axis)):
        # With fewer than four axes, ONNX Runtime interpolates along all of them. Other rows get the weight 0, which
        # still passes on NaN.
        call.not_along(range(len(shape)), "interpolates along")
    axes = call.from_front(call.attribute("axes", range(len(shape))))
    by_scale, by_size = (1, -1) if call.operator == "Upsample" or call.opset < 11 else (2, 3)
    sized = by_size > 0 and (to := call.maybe(by_size)) is not None and to.shape != (Size(0),)
    if call.operator == "Upsample" and call.opset < 9:
        operand = [plain(one) if one == int(one) else None for one in call.attribute("scales")]
    else:
        operand = list(numbers(call, by_size if sized else by_scale))
    if len(operand) != len(axes):
        raise NotProvenError("its operands differ in length")
    made = list(shape)
    for axis, one in zip(axes, operand, strict=True):
        if (as_size(one) == shape[axis] if sized else one == 1) if one is not None else False:
            continue
        call.not_along([axis], "resizes")
        if isinstance(one, Size) and one.counts_rows:
            raise NotProvenError(f"it resizes axis {axis} by the number of rows")
        if sized and one is not None and as_size(one).nonnegative:
            made[axis] = as_size(one)
        elif not sized and isinstance(one, float | int) and one >= 1:
            made[axis] = shape[axis] * Size(int(one))
        else:
            made[axis] = call.fresh()
    return Tensor(tuple(made), data.rows)


@rule("GridSample")
def grid_sample(call: OperatorCall) -> Outcome:
    """Samples each image at its own positions."""
    shape, grid = call.shape(0), call.input(1)
    if call.rows != grid.rows or (call.rows is not None and call.rows.axis != 0):
        raise NotProvenError("its inputs do not have their rows along axis 0")
    return Tensor((*shape[:2], *call.shape(1)[1:-1]), call.rows)


@rule("AffineGrid", counts=True)
def affine_grid(call: OperatorCall) -> Outcome:
    rows, sizes = call.rows, [as_size(one) for one in numbers(call, 1)]
    if rows not in (None, RowAxis(0)) or any(size.counts_rows for size in sizes[1:]):
        raise NotProvenError("its rows do not lie along axis 0")
    if sizes[0] != rows.size if rows is not None else sizes[0].counts_rows:
        raise NotProvenError("its size is not that of its rows")
    sizes = [call.size(size) for size in sizes]
    return Tensor((sizes[0], *sizes[2:], Size(len(sizes) - 2)), rows)
