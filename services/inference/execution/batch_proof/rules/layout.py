"""Operators that move, repeat or drop elements: reshapes, transposes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from services.inference.execution.batch_proof.abstract_value import (
    Content,
    RowAxis,
    Shape,
    Tensor,
    Values,
    as_size,
    known,
    plain,
)
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    from_front,
    shape_of,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.reshaping import grown_rows, reshaped, resolved, without
from services.inference.execution.batch_proof.sizes import ONE, Size, product

_LONGEST_SHAPE = 64
_BEYOND_ANY_AXIS = 10**9
_COUNTED = "the number of rows becomes a value"
_LENGTHS_DIFFER = "its operands differ in length"


def numbers(call: OperatorCall, index: int) -> Values:
    """The values of an operand that is a shape or part of one; unknown elements become symbols.

    Raises NotProvenError if its length is not known, or it depends on the rows.
    """
    tensor = call.input(index)
    if tensor.rows is not None:
        raise NotProvenError(f"input {index} depends on the rows")
    if tensor.values is not None:
        return tensor.values
    shape = call.shape(index)
    if len(shape) > 1 or any(size.known is None for size in shape):
        raise NotProvenError(f"the length of input {index} is not known")
    made = np.empty([size.coefficient for size in shape], object)
    for element in np.ndindex(made.shape):
        made[element] = call.symbols.number()
    return made


def moved(tensor: Tensor, to: Tensor) -> Tensor:
    """The elements of `tensor` in the places of `to`."""
    return replace(tensor, shape=to.shape, rows=to.rows, values=None)


def _check_moves_whole(data: Tensor, does: str) -> None:
    if data.content is Content.POSITION_FIRST:
        raise NotProvenError(f"it {does} indices")


@rule("Reshape", counts=True, positions=True)
def reshape(call: OperatorCall) -> Outcome:
    """Reshapes to a shape that may be computed in the graph."""
    data = call.input(0)
    _check_moves_whole(data, "reshapes")
    sizes = resolved(list(numbers(call, 1)), data.shape, not call.attribute("allowzero", 0))
    made = reshaped(call.same, sizes, call.symbols)
    if data.values is None:
        return moved(data, made)
    shape = made.shape or ()
    if any(size.known is None for size in shape) or product(shape).coefficient != data.values.size:
        raise NotProvenError("it gives a shape another shape that is not known")
    return known(data.values.reshape([size.coefficient for size in shape]))


@rule("Flatten")
def flatten(call: OperatorCall) -> Outcome:
    axis = int(call.attribute("axis", 1))
    axis = axis + call.rank if axis < 0 else axis
    return reshaped(call.same, [product(call.shape(0)[:axis]), product(call.shape(0)[axis:])], call.symbols)


@rule("Squeeze", counts=True, positions=True)
def squeeze(call: OperatorCall) -> Outcome:
    """Without axes it drops all axes of size 1, which includes the row axis if there is one row."""
    data, shape = call.input(0), call.shape(0)
    axes = call.axes()
    if axes is None:
        if data.rows is not None:
            raise NotProvenError(f"without axes it leaves out axis {data.rows.axis} if there is one row")
        if any(size.known is None for size in shape):
            raise NotProvenError("it leaves out axes by sizes that are not known")
        axes = [axis for axis, size in enumerate(shape) if size == ONE]
    dropped = set(call.from_front(axes))
    call.not_along(dropped, "leaves out")
    if data.values is not None:
        return known(data.values.squeeze(tuple(dropped)))
    _check_moves_whole(data, "reshapes")
    return moved(data, without(shape, data.rows, dropped))


@rule("Unsqueeze", counts=True, positions=True)
def unsqueeze(call: OperatorCall) -> Outcome:
    data, shape = call.input(0), call.shape(0)
    axes = call.axes()
    if data.content is Content.POSITION_FIRST or axes is None:
        raise NotProvenError("it reshapes indices")
    rank = len(shape) + len(axes)
    inserted = {from_front(axis, rank) for axis in axes}
    if data.values is not None:
        return known(np.expand_dims(data.values, tuple(inserted)))
    order = [axis for axis in range(rank) if axis not in inserted]
    grown = [ONE] * rank
    for axis, size in zip(order, shape, strict=True):
        grown[axis] = size
    return moved(data, Tensor(tuple(grown), None if data.rows is None else data.rows.at(order[data.rows.axis])))


@rule("Transpose", counts=True, positions=True)
def transpose(call: OperatorCall) -> Outcome:
    data, shape, rows = call.input(0), call.shape(0), call.rows
    order = call.from_front(call.attribute("perm", range(len(shape))[::-1]))
    if data.values is not None:
        return known(data.values.transpose(order))
    _check_moves_whole(data, "moves")
    sizes = tuple(shape[axis] for axis in order)
    return moved(data, Tensor(sizes, None if rows is None else rows.at(order.index(rows.axis))))


@rule("Concat", counts=True, positions=True)
def concat(call: OperatorCall) -> Outcome:
    """Joins tensors that have no rows, or all have their rows along the same axis."""
    shapes = [shape_of(tensor, "an input") for tensor in call.given]
    axis = from_front(int(call.attribute("axis")), len(shapes[0]))
    values = [tensor.values for tensor in call.given if tensor.values is not None]
    if len(values) == len(call.given):
        return known(np.concatenate(values, axis))
    if _is_shape(call.given):
        return known(np.concatenate([numbers(call, index) for index in range(len(call.given))]))
    if any(tensor.counts_rows for tensor in call.given):
        raise NotProvenError(_COUNTED)
    return replace(joined(call.given, axis, call), content=_joined_content(call, axis))


def joined(tensors: Sequence[Tensor], axis: int, call: OperatorCall) -> Tensor:
    """The concatenation. Raises NotProvenError unless all tensors have their rows along the same axis."""
    rows = tensors[0].rows
    if any(tensor.rows != rows for tensor in tensors):
        raise NotProvenError("its inputs do not have their rows along the same axis")
    shapes = [shape_of(tensor, "an input") for tensor in tensors]
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise NotProvenError("its inputs differ in their number of axes")
    along = [shape[axis] for shape in shapes]
    if all(size.known is not None for size in along):
        total = Size(sum(size.coefficient for size in along))
    else:
        total = call.symbols.size(("concat", *along))
    if rows is not None and rows.axis == axis:
        # All rows of the first tensor come before all rows of the second.
        rows = RowAxis(axis, rows.outer * Size(len(tensors)), rows.inner)
        total = rows.size
    return Tensor((*shapes[0][:axis], total, *shapes[0][axis + 1 :]), rows)


def _is_shape(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are short vectors without rows, which may form a shape."""
    shapes = [tensor.shape or () for tensor in tensors if tensor.rows is None]
    lengths = [shape[0].coefficient for shape in shapes if len(shape) == 1 and shape[0].known is not None]
    return len(lengths) == len(tensors) and sum(lengths) <= _LONGEST_SHAPE


def _joined_content(call: OperatorCall, axis: int) -> Content:
    """The content of a concatenation. Row numbers followed by other indices of the same rows are inputs of GatherND."""
    first, *others = call.given
    if all(tensor.content is Content.OWN for tensor in call.given):
        return Content.OWN
    shape = call.shape(0)
    counts = first.content is Content.POSITION and call.input(0).stride == ONE
    own = all(tensor.content is Content.OWN for tensor in others)
    if counts and own and axis == len(shape) - 1 and shape[axis] == ONE:
        return Content.POSITION_FIRST
    raise NotProvenError("numbers of rows become values")


@rule("Split")
def split(call: OperatorCall) -> Outcome:
    call.batch_independent(1)
    shape, axis = call.shape(0), call.axis(0)
    call.not_along([axis], "splits")
    parts = call.input(1).values if call.maybe(1) is not None else call.attribute("split")
    if parts is not None:
        sizes = [call.size(as_size(part)) for part in parts]
    else:
        whole = shape[axis].known
        even = None if whole is None or whole % call.outputs else Size(whole // call.outputs)
        sizes = [even or call.fresh() for _ in range(call.outputs)]
    return [Tensor((*shape[:axis], size, *shape[axis + 1 :]), call.rows) for size in sizes]


@rule("Slice", counts=True)
def slice_(call: OperatorCall) -> Outcome:
    """Takes a slice. Along the row axis it must take all rows."""
    data, shape = call.input(0), call.shape(0)
    axes: Sequence[int] | None
    if call.opset < 10:
        starts, ends = (list(call.attribute(name)) for name in ("starts", "ends"))
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends = list(numbers(call, 1)), list(numbers(call, 2))
        axes = call.integers(3)
        steps = None if call.maybe(4) is None else list(numbers(call, 4))
    axes = call.from_front(range(len(starts)) if axes is None else axes)
    steps = [1] * len(starts) if steps is None else steps
    if not len(axes) == len(starts) == len(ends) == len(steps):
        raise NotProvenError(_LENGTHS_DIFFER)
    bounds = [plain(one) for one in (*starts, *ends, *steps)]
    if data.values is not None and len(axes) == 1 and all(isinstance(bound, int) for bound in bounds):
        return known(_sliced_values(data.values, axes[0], *bounds))
    if data.counts_rows:
        raise NotProvenError(_COUNTED)
    sizes = list(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if plain(start) == 0 and plain(step) == 1 and _at_least(end, shape[axis]):
            continue
        call.not_along([axis], "takes a part of")
        if any(as_size(one).counts_rows for one in (start, end, step)):
            raise NotProvenError("it takes a part as long as the number of rows")
        sizes[axis] = _length(call, shape[axis], plain(start), plain(end), plain(step))
    return Tensor(tuple(sizes), data.rows)


def _at_least(end: Any, size: Size) -> bool:
    number = plain(end)
    # Exporters write a large number, beyond the length of any axis, for "to the end".
    return as_size(end) == size or (isinstance(number, int) and number >= _BEYOND_ANY_AXIS)


def _length(call: OperatorCall, size: Size, start: Any, end: Any, step: Any) -> Size:
    if size.known is not None and all(isinstance(one, int) for one in (start, end, step)) and step:
        return Size(len(range(*slice(start, end, step).indices(size.known)))) if step > 0 else call.fresh()
    if start == 0 and step == 1 and as_size(end).nonnegative:
        return call.symbols.cut(size, as_size(end))
    return call.symbols.size(("slice", size, start, end, step))


def _sliced_values(values: Values, axis: int, start: int, end: int | None, step: int) -> Values:
    if step < 0:
        # ONNX Runtime also reads the largest numbers as "to the front".
        if end is not None and end >= -values.shape[axis]:
            raise NotProvenError("it takes a part of a shape in reverse")
        end = None
    return values[(slice(None),) * axis + (slice(start, end, step),)]


@rule("Pad")
def pad(call: OperatorCall) -> Outcome:
    """Pads along axes other than the row axis."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    amounts = [int(one) for one in call.attribute("pads", ())] if call.opset < 11 else list(numbers(call, 1))
    given = call.integers(3)
    axes = range(len(shape)) if given is None else call.from_front(given)
    if len(amounts) != 2 * len(axes):
        raise NotProvenError(_LENGTHS_DIFFER)
    sizes = list(shape)
    for axis, before, after in zip(axes, map(plain, amounts), map(plain, amounts[len(axes) :]), strict=False):
        if before == after == 0:
            continue
        call.not_along([axis], "pads")
        whole = shape[axis].known
        is_known = whole is not None and isinstance(before, int) and isinstance(after, int)
        sizes[axis] = Size(max(whole + before + after, 0)) if is_known and whole is not None else call.fresh()
    return Tensor(tuple(sizes), call.rows)


@rule("Tile", counts=True)
def tile(call: OperatorCall) -> Outcome:
    """Repeats along axes other than the row axis, or repeats a tensor without rows once per row."""
    data, shape = call.input(0), call.shape(0)
    if data.counts_rows:
        raise NotProvenError(_COUNTED)
    repeats = [as_size(one) for one in numbers(call, 1)]
    if len(repeats) != len(shape):
        raise NotProvenError(_LENGTHS_DIFFER)
    if data.rows is not None and repeats[data.rows.axis] != ONE:
        raise NotProvenError(f"it repeats axis {data.rows.axis}, along which the rows lie")
    sizes = tuple(
        size * count if count.nonnegative else call.fresh() for size, count in zip(shape, repeats, strict=True)
    )
    if (axis := _once_per_row(repeats, data.rows)) is None:
        return moved(data, Tensor(sizes, data.rows))
    # Copy b belongs to row b: element i of a copy of c elements has the index (b * c + i).
    return Tensor(sizes, grown_rows(axis, sizes[axis]))


def _once_per_row(sizes: Sequence[Size], rows: RowAxis | None) -> int | None:
    """The axis along which a tensor without rows is repeated once per row, so that it becomes the row axis; None if
    there is none. Raises NotProvenError if rows would be repeated."""
    counting = [axis for axis, size in enumerate(sizes) if size.counts_rows and (rows is None or axis != rows.axis)]
    if counting and (len(counting) > 1 or rows is not None):
        raise NotProvenError("it repeats rows as many times as there are rows")
    return counting[0] if counting else None


@rule("Expand", counts=True, positions=True)
def expand(call: OperatorCall) -> Outcome:
    data, shape = call.input(0), call.shape(0)
    if data.counts_rows:
        raise NotProvenError(_COUNTED)
    _check_moves_whole(data, "reshapes")
    target = tuple(
        size if (size := as_size(one)).nonnegative else call.symbols.size(("extent", size)) for one in numbers(call, 1)
    )
    rank = max(len(shape), len(target))
    wide, goal = ((ONE,) * (rank - len(one)) + one for one in (shape, target))
    rows = None if data.rows is None else data.rows.at(data.rows.axis + rank - len(shape))
    if rows is not None and goal[rows.axis] not in (ONE, rows.size):
        raise NotProvenError(f"it expands axis {rows.axis}, along which the rows lie, to another size")
    if (axis := _once_per_row(goal, rows)) is None:
        return moved(data, Tensor(_expanded(call, wide, goal, rows), rows))
    if wide[axis] != ONE:
        raise NotProvenError(f"it expands axis {axis}, whose size is not 1, to the number of rows")
    rows = grown_rows(axis, goal[axis])
    return Tensor(_expanded(call, wide, goal, rows), rows)


def _expanded(call: OperatorCall, wide: Shape, goal: Shape, rows: RowAxis | None) -> Shape:
    """The broadcast of two shapes of equal rank, with the size of the rows along their axis."""
    axis = -1 if rows is None else rows.axis
    hidden = [tuple(ONE if other == axis else size for other, size in enumerate(shape)) for shape in (wide, goal)]
    made = broadcast(hidden, call.symbols)
    return made if rows is None else (*made[:axis], rows.size, *made[axis + 1 :])


@rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(call: OperatorCall) -> Outcome:
    shape = call.shape(0)
    call.not_along(range(1, len(shape)), "moves elements of")
    side = Size(int(call.attribute("blocksize")))
    if call.operator == "DepthToSpace":
        depth, spatial = shape[1].divided_by(side * side), [size * side for size in shape[2:]]
    else:
        depth, spatial = shape[1] * side * side, [size.divided_by(side) or call.fresh() for size in shape[2:]]
    return Tensor((shape[0], depth or call.fresh(), *spatial), call.rows)


@rule("ReverseSequence")
def reverse_sequence(call: OperatorCall) -> Outcome:
    """Reverses along `time_axis`; each element along `batch_axis` has its own length."""
    lengths = call.input(1)
    batch, time = call.axis(1, "batch_axis"), call.axis(0, "time_axis")
    made = call.keeping([time], "reverses")
    if call.rows is not None and call.rows.axis == batch:
        if lengths.rows is None or lengths.rows.at(batch) != call.rows:
            raise NotProvenError("its lengths are not those of the rows")
    else:
        call.batch_independent(1)
    return made


@rule("Compress")
def compress(call: OperatorCall) -> Outcome:
    call.batch_independent(1)
    shape = call.shape(0)
    if "axis" not in call.attributes:
        raise NotProvenError("without an axis it selects from all rows")
    axis = call.axis(0)
    call.not_along([axis], "selects along")
    return Tensor((*shape[:axis], call.fresh(), *shape[axis + 1 :]), call.rows)
