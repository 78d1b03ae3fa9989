"""One use of an operator, as passed to its rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor
from services.inference.execution.batch_proof.sizes import ONE, Size, Symbols


class NotProvenError(Exception):
    """The rule cannot show that rows stay independent; the message says why, without the node."""


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """`inputs`: None for optional inputs that are left out. `opset`: the version of the operator's domain.

    Methods raise NotProvenError where an input is missing, or something is not known.
    """

    operator: str
    opset: int
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any]
    outputs: int
    symbols: Symbols

    def maybe(self, index: int) -> Tensor | None:
        """An optional input; None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def input(self, index: int) -> Tensor:
        value = self.maybe(index)
        if value is None:
            raise NotProvenError(f"input {index} is missing")
        return value

    @property
    def given(self) -> list[Tensor]:
        return [value for value in self.inputs if value is not None]

    def shape(self, index: int) -> Shape:
        return shape_of(self.input(index), f"input {index}")

    @property
    def rank(self) -> int:
        return len(self.shape(0))

    @property
    def rows(self) -> RowAxis | None:
        return self.input(0).rows

    @property
    def same(self) -> Tensor:
        """Input 0 with other elements."""
        return Tensor(self.input(0).shape, self.rows)

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or the `default` of the operator's definition."""
        return self.attributes.get(name, default)

    def axis(self, default: int, name: str = "axis") -> int:
        """An attribute that is an axis of input 0, counted from the front."""
        return from_front(int(self.attribute(name, default)), self.rank)

    def axes(self) -> Sequence[int] | None:
        """The axes from input 1 or, as in older opsets, the attribute; None if neither is given."""
        return self.integers(1) if self.maybe(1) is not None else self.attribute("axes")

    def integers(self, index: int) -> list[int] | None:
        """An input of whole numbers that the graph holds; None if it is left out."""
        value = self.maybe(index)
        if value is None:
            return None
        if value.values is None or any(isinstance(number, Size) for number in value.values.flat):
            raise NotProvenError(f"input {index} is not a constant of the graph")
        return [int(number) for number in value.values.flat]

    def batch_independent(self, *indices: int) -> None:
        """Raises NotProvenError if one of these inputs (usually weights) depends on the rows."""
        for index in indices:
            value = self.maybe(index)
            if value is not None and not value.independent:
                raise NotProvenError(f"input {index} depends on the rows")

    def batch_independent_except(self, *indices: int) -> None:
        """Raises NotProvenError if an input other than these depends on the rows."""
        self.batch_independent(*[index for index in range(len(self.inputs)) if index not in indices])

    def not_along(self, axes: Collection[int], does: str) -> None:
        """Raises NotProvenError if the rows of input 0 lie along one of the `axes`."""
        not_along(self.rows, axes, does)

    def from_front(self, axes: Iterable[int]) -> list[int]:
        """Axes of input 0, counted from the front."""
        return [from_front(axis, self.rank) for axis in axes]

    def keeping(self, axes: Collection[int], does: str) -> Tensor:
        """Input 0 with other elements, whose rows may not lie along the `axes`."""
        self.not_along(axes, does)
        return Tensor(self.shape(0), self.rows)

    def fresh(self) -> Size:
        return self.symbols.size()

    def size(self, number: Size) -> Size:
        """A number as a size; a new unknown one if it may be negative."""
        return number if number.nonnegative else self.fresh()

    def broadcast(self, tensors: Sequence[Tensor]) -> Tensor:
        """The shape and rows of an elementwise result."""
        shape = broadcast([shape_of(tensor, "an input") for tensor in tensors], self.symbols)
        return Tensor(shape, common_rows(tensors, len(shape)))


def shape_of(tensor: Tensor, what: str) -> Shape:
    """The shape of a tensor. Raises NotProvenError if not even the rank is known."""
    if tensor.shape is None:
        raise NotProvenError(f"the shape of {what} is not known")
    return tensor.shape


def from_front(axis: int, rank: int) -> int:
    """The axis counted from the front. Raises NotProvenError if there is no such axis."""
    if not -rank <= axis < rank:
        raise NotProvenError(f"there is no axis {axis} in a tensor of {rank}")
    return axis % rank if rank else 0


def not_along(rows: RowAxis | None, axes: Collection[int], does: str) -> None:
    """Raises NotProvenError if the rows lie along one of the `axes`."""
    if rows is not None and rows.axis in axes:
        raise NotProvenError(f"it {does} axis {rows.axis}, along which the rows lie")


def broadcast(shapes: Sequence[Shape], symbols: Symbols) -> Shape:
    """The shape by NumPy's rule. If two sizes may both be 1, the result is a new symbol."""
    rank = max(map(len, shapes), default=0)
    result = []
    for axis in range(-rank, 0):
        size = ONE
        for shape in shapes:
            if len(shape) >= -axis and shape[axis] not in (ONE, size):
                other = shape[axis]
                if size == ONE or (size.known is None and other.known is not None):
                    size = other
                elif other.known is None and size.known is None:
                    size = symbols.broadcast(size, other)
        result.append(size)
    return tuple(result)


def common_rows(tensors: Sequence[Tensor], rank: int) -> RowAxis | None:
    """The place of the rows in a broadcast result with `rank` axes. Raises NotProvenError if they are not aligned."""
    shapes = [shape_of(tensor, "an input") for tensor in tensors]
    if any(len(shape) > rank for shape in shapes):
        raise NotProvenError("an input has more axes than the result")
    found: RowAxis | None = None
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.rows is not None:
            rows = tensor.rows.at(tensor.rows.axis + rank - len(shape))
            if found is not None and found != rows:
                raise NotProvenError(
                    f"the rows lie along axis {found.axis} of one input and along axis {rows.axis} of another"
                    if found.axis != rows.axis
                    else f"the rows are in different orders along axis {rows.axis}"
                )
            found = rows
    if found is None:
        return None
    for tensor, shape in zip(tensors, shapes, strict=True):
        axis = found.axis - (rank - len(shape))
        if tensor.rows is None and axis >= 0 and shape[axis] != ONE:
            raise NotProvenError(
                f"an input without rows has a size other than 1 at axis {found.axis}, along which the rows lie"
            )
    return found
