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
    plain,
)
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    from_front,
    not_along,
    shape_of,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.reshaping import reshaped, resolved
from services.inference.execution.batch_proof.sizes import ONE, ROWS, Size, product

_LONGEST_SHAPE = 64
_BEYOND_ANY_AXIS = 10**9


def numbers(call: OperatorCall, place: int) -> Values:
    """The values of an operand that is a shape or part of one; unknown elements become symbols.

    Raises NotProvenError if its length is not known, or it depends on the rows.
    """
    tensor = call.input(place)
    if tensor.rows is not None:
        raise NotProvenError(f"input {place} depends on the rows")
    if tensor.values is not None:
        return tensor.values
    shape = shape_of(tensor, f"input {place}")
    if len(shape) > 1 or any(size.known is None for size in shape):
        raise NotProvenError(f"the length of input {place} is not known")
    made = np.empty([size.coefficient for size in shape], object)
    for index in np.ndindex(made.shape):
        made[index] = call.symbols.number()
    return made


def made_of(values: Values) -> Tensor:
    """A tensor with these values."""
    return Tensor(tuple(map(Size, values.shape)), values=values)


def moved(tensor: Tensor, shape: Shape, rows: RowAxis | None) -> Tensor:
    """A tensor with the same elements in other places."""
    return replace(tensor, shape=shape, rows=rows, values=None)


@rule("Reshape", counts=True, positions=True)
def reshape(call: OperatorCall) -> Outcome:
    """Reshapes to a shape that may be computed in the graph."""
    data = call.input(0)
    if data.content is Content.POSITION_FIRST:
        raise NotProvenError("it reshapes indices")
    zero_copies = not call.attribute("allowzero", 0)
    sizes = resolved(list(numbers(call, 1)), data.shape, zero_copies)
    made = reshaped(_without_values(data), sizes, call.symbols)
    if data.values is not None:
        return made_of(_values_reshaped(data.values, made.shape or ()))
    return moved(data, made.shape or (), made.rows)


def _without_values(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape, tensor.rows)


def _values_reshaped(values: Values, shape: Shape) -> Values:
    if any(size.known is None for size in shape) or product(shape).coefficient != values.size:
        raise NotProvenError("it gives a shape another shape that is not known")
    return values.reshape([size.coefficient for size in shape])


@rule("Flatten")
def flatten(call: OperatorCall) -> Outcome:
    """Reshapes to two axes."""
    data, shape = call.input(0), call.shape(0)
    axis = int(call.attribute("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return reshaped(_without_values(data), [product(shape[:axis]), product(shape[axis:])], call.symbols)


@rule("Squeeze", counts=True, positions=True)
def squeeze(call: OperatorCall) -> Outcome:
    """Without axes it drops all axes of size 1, which includes the row axis if there is one row."""
    data, shape = call.input(0), call.shape(0)
    axes = call.integers(1) if call.maybe(1) is not None else call.attribute("axes")
    if axes is None:
        if data.rows is not None:
            raise NotProvenError(f"without axes it leaves out axis {data.rows.axis} if there is one row")
        if any(size.known is None for size in shape):
            raise NotProvenError("it leaves out axes by sizes that are not known")
        axes = [axis for axis, size in enumerate(shape) if size == ONE]
    places = {from_front(axis, len(shape)) for axis in axes}
    not_along(data.rows, sorted(places), "leaves out")
    left = tuple(size for axis, size in enumerate(shape) if axis not in places)
    if data.values is not None:
        return made_of(data.values.squeeze(tuple(places)))
    if data.content is Content.POSITION_FIRST:
        raise NotProvenError("it reshapes indices")
    rows = data.rows
    return moved(data, left, None if rows is None else rows.at(rows.axis - sum(axis < rows.axis for axis in places)))


@rule("Unsqueeze", counts=True, positions=True)
def unsqueeze(call: OperatorCall) -> Outcome:
    """Inserts axes of size 1."""
    data, shape = call.input(0), call.shape(0)
    axes = call.integers(1) if call.maybe(1) is not None else call.attribute("axes")
    if data.content is Content.POSITION_FIRST or axes is None:
        raise NotProvenError("it reshapes indices")
    rank = len(shape) + len(axes)
    places = {from_front(axis, rank) for axis in axes}
    if data.values is not None:
        return made_of(np.expand_dims(data.values, tuple(places)))
    order = [place for place in range(rank) if place not in places]
    grown = [ONE] * rank
    for place, size in zip(order, shape, strict=True):
        grown[place] = size
    return moved(data, tuple(grown), None if data.rows is None else data.rows.at(order[data.rows.axis]))


@rule("Transpose", counts=True, positions=True)
def transpose(call: OperatorCall) -> Outcome:
    """Permutes the axes; by default it reverses them."""
    data, shape = call.input(0), call.shape(0)
    order = [from_front(axis, len(shape)) for axis in call.attribute("perm", tuple(reversed(range(len(shape)))))]
    if data.values is not None:
        return made_of(data.values.transpose(order))
    if data.content is Content.POSITION_FIRST:
        raise NotProvenError("it moves indices")
    rows = data.rows
    return moved(data, tuple(shape[axis] for axis in order), None if rows is None else rows.at(order.index(rows.axis)))


@rule("Concat", counts=True, positions=True)
def concat(call: OperatorCall) -> Outcome:
    """Joins tensors that have no rows, or all have their rows along the same axis."""
    shapes = [shape_of(tensor, "an input") for tensor in call.given]
    axis = from_front(int(call.attribute("axis")), len(shapes[0]))
    values = [tensor.values for tensor in call.given]
    if all(one is not None for one in values):
        return made_of(np.concatenate([one for one in values if one is not None], axis))
    if _is_shape(call.given):
        return made_of(np.concatenate([numbers(call, place) for place in range(len(call.given))]))
    if any(tensor.counts_rows for tensor in call.given):
        raise NotProvenError("the number of rows becomes a value")
    made = joined(call.given, axis, call)
    return Tensor(made.shape, made.rows, content=_joined_content(call, axis))


def joined(tensors: Sequence[Tensor], axis: int, call: OperatorCall) -> Tensor:
    """The concatenation. Raises NotProvenError unless all tensors have their rows along the same axis."""
    first, *others = tensors
    if any(tensor.rows != first.rows for tensor in others):
        raise NotProvenError("its inputs do not have their rows along the same axis")
    rows = first.rows
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
    known = [shape[0].coefficient for shape in shapes if len(shape) == 1 and shape[0].known is not None]
    return len(known) == len(tensors) and sum(known) <= _LONGEST_SHAPE


def _joined_content(call: OperatorCall, axis: int) -> Content:
    """The content of a concatenation. Row numbers followed by other indices of the same rows are inputs of GatherND."""
    contents = [tensor.content for tensor in call.given]
    if all(content is Content.OWN for content in contents):
        return Content.OWN
    shape = call.shape(0)
    own = all(content is Content.OWN for content in contents[1:])
    first = contents[0] is Content.POSITION and call.input(0).stride == ONE
    if first and own and axis == len(shape) - 1 and shape[axis] == ONE:
        return Content.POSITION_FIRST
    raise NotProvenError("numbers of rows become values")


@rule("Split")
def split(call: OperatorCall) -> Outcome:
    """Splits along one axis, by default the first."""
    call.batch_independent(1)
    data, shape = call.input(0), call.shape(0)
    axis = call.axis("axis", 0, len(shape))
    not_along(data.rows, [axis], "splits")
    parts = call.input(1).values if call.maybe(1) is not None else call.attribute("split")
    if parts is not None:
        sizes = [as_size(part) if as_size(part).nonnegative else call.fresh() for part in parts]
    else:
        whole = shape[axis].known
        even = None if whole is None or whole % call.outputs else Size(whole // call.outputs)
        sizes = [even or call.fresh() for _ in range(call.outputs)]
    return [Tensor((*shape[:axis], size, *shape[axis + 1 :]), data.rows) for size in sizes]


@rule("Slice", counts=True)
def slice_(call: OperatorCall) -> Outcome:
    """Takes a slice. Along the row axis it must take all rows."""
    data, shape = call.input(0), call.shape(0)
    if call.opset < 10:
        starts, ends = (list(call.attribute(name)) for name in ("starts", "ends"))
        axes = list(call.attribute("axes", range(len(starts))))
        steps: list[Any] = [1] * len(starts)
    else:
        starts, ends = list(numbers(call, 1)), list(numbers(call, 2))
        told = call.integers(3)
        axes = list(range(len(starts))) if told is None else told
        steps = [1] * len(starts) if call.maybe(4) is None else list(numbers(call, 4))
    axes = [from_front(axis, len(shape)) for axis in axes]
    if not len(axes) == len(starts) == len(ends) == len(steps):
        raise NotProvenError("its operands differ in length")
    bounds = [plain(one) for one in (*starts, *ends, *steps)]
    if data.values is not None and len(axes) == 1 and all(isinstance(bound, int) for bound in bounds):
        return made_of(_sliced_values(data.values, axes[0], *bounds))
    if data.counts_rows:
        raise NotProvenError("the number of rows becomes a value")
    sizes = list(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        whole = plain(start) == 0 and plain(step) == 1 and _at_least(end, shape[axis])
        if whole:
            continue
        if data.rows is not None and axis == data.rows.axis:
            raise NotProvenError(f"it takes a part of axis {axis}, along which the rows lie")
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
        if (
            end is not None and end >= -values.shape[axis]
        ):  # ONNX Runtime also reads the largest numbers as "to the front"
            raise NotProvenError("it takes a part of a shape in reverse")
        end = None
    return values[(slice(None),) * axis + (slice(start, end, step),)]


@rule("Pad")
def pad(call: OperatorCall) -> Outcome:
    """Pads along axes other than the row axis."""
    data, shape = call.input(0), call.shape(0)
    call.batch_independent_except(0)
    amounts = [int(one) for one in call.attribute("pads", ())] if call.opset < 11 else list(numbers(call, 1))
    axes = call.integers(3)
    places = list(range(len(shape))) if axes is None else [from_front(axis, len(shape)) for axis in axes]
    if len(amounts) != 2 * len(places):
        raise NotProvenError("its operands differ in length")
    sizes = list(shape)
    for place, axis in enumerate(places):
        before, after = plain(amounts[place]), plain(amounts[place + len(places)])
        if before == after == 0:
            continue
        not_along(data.rows, [axis], "pads")
        whole = shape[axis].known
        known = whole is not None and isinstance(before, int) and isinstance(after, int)
        sizes[axis] = Size(max(whole + before + after, 0)) if known and whole is not None else call.fresh()
    return Tensor(tuple(sizes), data.rows)


@rule("Tile", counts=True)
def tile(call: OperatorCall) -> Outcome:
    """Repeats along axes other than the row axis, or repeats a tensor without rows once per row."""
    if call.input(0).counts_rows:
        raise NotProvenError("the number of rows becomes a value")
    data, shape = call.input(0), call.shape(0)
    repeats = [as_size(one) for one in numbers(call, 1)]
    if len(repeats) != len(shape):
        raise NotProvenError("its operands differ in length")
    if data.rows is not None and repeats[data.rows.axis] != ONE:
        raise NotProvenError(f"it repeats axis {data.rows.axis}, along which the rows lie")
    sizes = [size * count if count.nonnegative else call.fresh() for size, count in zip(shape, repeats, strict=True)]
    return _repeated(data, sizes, repeats)


def _repeated(data: Tensor, sizes: list[Size], repeats: list[Size]) -> Tensor:
    """The repeated tensor. An axis that is repeated once per row becomes the row axis."""
    counting = [axis for axis, count in enumerate(repeats) if count.counts_rows]
    if not counting:
        return moved(data, tuple(sizes), data.rows)
    if len(counting) > 1 or data.rows is not None:
        raise NotProvenError("it repeats rows as many times as there are rows")
    (axis,) = counting
    # Copy b belongs to row b: element i of a copy of c elements has the index (b * c + i).
    inner = sizes[axis].divided_by(ROWS)
    if inner is None or inner.counts_rows:
        raise NotProvenError(f"axis {axis} grows with the square of the number of rows")
    return Tensor(tuple(sizes), RowAxis(axis, inner=inner))


@rule("Expand", counts=True, positions=True)
def expand(call: OperatorCall) -> Outcome:
    """Broadcasts to a shape."""
    data, shape = call.input(0), call.shape(0)
    if data.counts_rows:
        raise NotProvenError("the number of rows becomes a value")
    if data.content is Content.POSITION_FIRST:
        raise NotProvenError("it reshapes indices")
    target = tuple(
        size if (size := as_size(one)).nonnegative else call.symbols.size(("extent", size)) for one in numbers(call, 1)
    )
    rank = max(len(shape), len(target))
    wide, goal = ((ONE,) * (rank - len(one)) + one for one in (shape, target))
    counting = [axis for axis, size in enumerate(goal) if size.counts_rows]
    rows = None if data.rows is None else data.rows.at(data.rows.axis + rank - len(shape))
    if rows is not None:
        if goal[rows.axis] not in (ONE, rows.size):
            raise NotProvenError(f"it expands axis {rows.axis}, along which the rows lie, to another size")
        counting = [axis for axis in counting if axis != rows.axis]
    if not counting:
        others = broadcast([_hidden(wide, rows), _hidden(goal, rows)], call.symbols)
        sizes = [rows.size if rows is not None and axis == rows.axis else size for axis, size in enumerate(others)]
        return moved(data, tuple(sizes), rows)
    if rows is not None or len(counting) > 1:
        raise NotProvenError("it repeats rows as many times as there are rows")
    (axis,) = counting
    if wide[axis] != ONE:
        raise NotProvenError(f"it expands axis {axis}, whose size is not 1, to the number of rows")
    if (inner := goal[axis].divided_by(ROWS)) is None or inner.counts_rows:
        raise NotProvenError(f"axis {axis} grows with the square of the number of rows")
    made = RowAxis(axis, inner=inner)
    others = broadcast([_hidden(wide, made), _hidden(goal, made)], call.symbols)
    return Tensor(tuple(goal[axis] if place == axis else size for place, size in enumerate(others)), made)


def _hidden(shape: Shape, rows: RowAxis | None) -> Shape:
    """The shape with size 1 at the row axis."""
    return tuple(ONE if rows is not None and axis == rows.axis else size for axis, size in enumerate(shape))


@rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(call: OperatorCall) -> Outcome:
    """Moves elements between channels and spatial positions."""
    data, shape = call.input(0), call.shape(0)
    not_along(data.rows, range(1, len(shape)), "moves elements of")
    side = int(call.attribute("blocksize"))
    area = Size(side * side)
    if call.operator == "DepthToSpace":
        depth, places = shape[1].divided_by(area), [size * Size(side) for size in shape[2:]]
    else:
        depth, places = shape[1] * area, [size.divided_by(Size(side)) or call.fresh() for size in shape[2:]]
    return Tensor((shape[0], depth or call.fresh(), *places), data.rows)


@rule("ReverseSequence")
def reverse_sequence(call: OperatorCall) -> Outcome:
    """Reverses along `time_axis`; each element along `batch_axis` has its own length."""
    data, lengths = call.input(0), call.input(1)
    shape = call.shape(0)
    batch, time = call.axis("batch_axis", 1, len(shape)), call.axis("time_axis", 0, len(shape))
    not_along(data.rows, [time], "reverses")
    if data.rows is not None and data.rows.axis == batch:
        if lengths.rows is None or lengths.rows.at(batch) != data.rows:
            raise NotProvenError("its lengths are not those of the rows")
    else:
        call.batch_independent(1)
    return Tensor(shape, data.rows)


@rule("EyeLike", "NonZero", "Unique", "NonMaxSuppression", "StringSplit", "DynamicQuantizeLinear")
def over_all(call: OperatorCall) -> Outcome:
    """Operators whose results depend on the whole tensor."""
    reasons = {
        "EyeLike": "its elements depend on the number of their row",
        "NonZero": "how many elements it finds, and their order, depends on all rows",
        "Unique": "it compares all rows",
        "NonMaxSuppression": "how many boxes it selects depends on all rows",
        "StringSplit": "it pads all rows to the longest",
        "DynamicQuantizeLinear": "its scale is computed over all rows",
    }
    raise NotProvenError(reasons.get(call.operator, "there is no rule for it"))


@rule("Compress")
def compress(call: OperatorCall) -> Outcome:
    """Selects along an axis other than the row axis."""
    call.batch_independent(1)
    data, shape = call.input(0), call.shape(0)
    if "axis" not in call.attributes:
        raise NotProvenError("without an axis it selects from all rows")
    axis = call.axis("axis", 0, len(shape))
    not_along(data.rows, [axis], "selects along")
    return Tensor((*shape[:axis], call.fresh(), *shape[axis + 1 :]), data.rows)
