"""Computes where the rows lie after a tensor is reshaped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor, as_size
from services.inference.execution.batch_proof.operator_call import NotProvenError, shape_of
from services.inference.execution.batch_proof.sizes import ONE, ROWS, Size, Symbols, product


def without(shape: Shape, rows: RowAxis | None, axes: Collection[int], keep: bool = False) -> Tensor:
    """A tensor whose `axes`, along which no rows lie, are removed; with `keep`, they have size 1."""
    if keep:
        return Tensor(tuple(ONE if axis in axes else size for axis, size in enumerate(shape)), rows)
    moved = None if rows is None else rows.at(rows.axis - sum(axis < rows.axis for axis in axes))
    return Tensor(tuple(size for axis, size in enumerate(shape) if axis not in axes), moved)


def inserted(tensor: Tensor, shape: Shape, axis: int, size: Size) -> Tensor:
    """A tensor of this shape and with the rows of `tensor`, with a new `axis`."""
    rows = None if tensor.rows is None else tensor.rows.at(tensor.rows.axis + (axis <= tensor.rows.axis))
    return Tensor((*shape[:axis], size, *shape[axis:]), rows)


def grown_rows(axis: int, size: Size) -> RowAxis:
    """The rows along an axis that grows with them. Raises NotProvenError unless their number is a factor of it once."""
    inner = size.divided_by(ROWS)
    if inner is None or inner.counts_rows:
        raise NotProvenError(f"axis {axis} grows with the square of the number of rows")
    return RowAxis(axis, inner=inner)


def resolved(target: Sequence[Any], shape: Shape | None, zero_copies: bool) -> list[Size | None]:
    """The sizes that the shape operand of Reshape means; None for sizes that are only known in a run."""
    sizes: list[Size | None] = []
    inferred: int | None = None
    for axis, size in enumerate(map(as_size, target)):
        if size == Size(-1):
            inferred = axis
            sizes.append(None)
        elif size == Size(0) and zero_copies:
            sizes.append(shape[axis] if shape is not None and axis < len(shape) else None)
        else:
            # A size that may be negative may be -1.
            sizes.append(size if size.nonnegative else None)
    others = [size for axis, size in enumerate(sizes) if axis != inferred]
    if inferred is not None and shape is not None and None not in others:
        sizes[inferred] = product(shape).divided_by(product(size for size in others if size is not None))
    return sizes


def reshaped(tensor: Tensor, sizes: Sequence[Size | None], symbols: Symbols) -> Tensor:
    """The tensor in a new shape, whose sizes may be unknown (None). Raises NotProvenError if rows may merge."""
    if tensor.rows is None:
        if any(size is not None and size.counts_rows for size in sizes):
            raise NotProvenError("a tensor without rows takes a shape that counts the rows")
        return Tensor(tuple(size if size is not None else symbols.size() for size in sizes))
    shape, rows = shape_of(tensor, "the data"), tensor.rows
    outer = product(shape[: rows.axis]) * rows.outer
    before = ONE
    for axis, size in enumerate(sizes):
        if size is None:
            raise NotProvenError(f"the size of the new axis {axis} is not known, so rows may merge")
        if size.counts_rows:
            new_outer = outer.divided_by(before)
            inner = None if new_outer is None else size.divided_by(new_outer * ROWS)
            if new_outer is None or inner is None or inner.counts_rows or not inner.nonnegative:
                raise NotProvenError(f"the new axis {axis} does not hold whole rows")
            if any(other is not None and other.counts_rows for other in sizes[axis + 1 :]):
                raise NotProvenError("two sizes of the new shape count the rows")
            made = tuple(other if other is not None else symbols.size() for other in sizes)
            return Tensor(made, RowAxis(axis, new_outer, inner))
        before *= size
    raise NotProvenError(f"no size of the new shape counts the rows, which lie along axis {rows.axis}")
