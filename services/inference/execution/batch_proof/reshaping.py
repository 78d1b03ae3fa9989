"""Computes where the rows lie after a tensor is reshaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor, as_size
from services.inference.execution.batch_proof.operator_call import NotProvenError, shape_of
from services.inference.execution.batch_proof.sizes import ONE, ROWS, Size, Symbols, product


def resolved(target: Sequence[Any], shape: Shape | None, zero_copies: bool) -> list[Size | None]:
    """The sizes that the shape operand of Reshape means; None for sizes that are only known in a run."""
    sizes: list[Size | None] = []
    inferred: int | None = None
    for place, element in enumerate(target):
        size = as_size(element)
        if size == Size(-1):
            inferred = place
            sizes.append(None)
        elif size == Size(0) and zero_copies:
            sizes.append(shape[place] if shape is not None and place < len(shape) else None)
        else:
            # A size that may be negative may be -1.
            sizes.append(size if size.nonnegative else None)
    others = [size for place, size in enumerate(sizes) if place != inferred]
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
            raise NotProvenError(f"the size of the new axis {axis} cannot be told, so rows may merge")
        if size.counts_rows:
            return _placed(axis, outer, before, size, sizes, symbols)
        before *= size
    raise NotProvenError(f"no size of the new shape counts the rows, which lie along axis {rows.axis}")


def _placed(axis: int, outer: Size, before: Size, size: Size, sizes: Sequence[Size | None], symbols: Symbols) -> Tensor:
    new_outer = outer.divided_by(before)
    inner = None if new_outer is None else size.divided_by(new_outer * ROWS)
    if new_outer is None or inner is None or inner.counts_rows or not inner.nonnegative:
        raise NotProvenError(f"the new axis {axis} does not hold whole rows")
    if any(other is not None and other.counts_rows for other in sizes[axis + 1 :]):
        raise NotProvenError("two sizes of the new shape count the rows")
    shape = [other if other is not None else symbols.size() for other in sizes]
    return Tensor(tuple(shape), RowAxis(axis, new_outer, inner))
