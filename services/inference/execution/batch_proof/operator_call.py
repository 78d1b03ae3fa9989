"""One use of an operator, as passed to its rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor
from services.inference.execution.batch_proof.sizes import ONE, Size, Symbols


class NotProvenError(Exception):
    """The rule cannot show that rows stay independent; the message says why, without the node."""


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """`inputs`: None for optional inputs that are left out. `opset`: the version of the operator's domain."""

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
        """A required input. Raises NotProvenError if it is missing."""
        value = self.maybe(index)
        if value is None:
            raise NotProvenError(f"input {index} is missing")
        return value

    @property
    def given(self) -> list[Tensor]:
        """The inputs that are not left out."""
        return [value for value in self.inputs if value is not None]

    def shape(self, index: int) -> Shape:
        """The shape of an input. Raises NotProvenError if its rank is not known."""
        return shape_of(self.input(index), f"input {index}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or the `default` of the operator's definition."""
        return self.attributes.get(name, default)

    def axis(self, name: str, default: int, rank: int) -> int:
        """An attribute that is an axis, counted from the front."""
        return from_front(int(self.attribute(name, default)), rank)

    def integers(self, index: int) -> list[int] | None:
        """An input of whole numbers; None if it is left out. Raises NotProvenError if they are not in the graph."""
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

    def fresh(self) -> Size:
        """A new unknown size."""
        return self.symbols.size()


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


def not_along(rows: RowAxis | None, axes: Sequence[int] | range, does: str) -> None:
    """Raises NotProvenError if the rows lie along one of the `axes`."""
    if rows is not None and rows.axis in axes:
        raise NotProvenError(f"it {does} axis {rows.axis}, along which the rows lie")


def broadcast(shapes: Sequence[Shape], symbols: Symbols) -> Shape:
    """The shape by NumPy's rule. If two sizes may both be 1, the result is a new symbol."""
    rank = max(map(len, shapes), default=0)
    result = []
    for place in range(-rank, 0):
        size = ONE
        for shape in shapes:
            if len(shape) >= -place and shape[place] not in (ONE, size):
                other = shape[place]
                if size == ONE or (size.known is None and other.known is not None):
                    size = other
                elif other.known is None and size.known is None:
                    size = symbols.broadcast(size, other)
        result.append(size)
    return tuple(result)


def common_rows(tensors: Sequence[Tensor], rank: int) -> RowAxis | None:
    """The place of the rows in a broadcast result with `rank` axes. Raises NotProvenError if they are not aligned."""
    found: RowAxis | None = None
    if any(len(shape_of(tensor, "an input")) > rank for tensor in tensors):
        raise NotProvenError("an input has more axes than the result")
    for tensor in tensors:
        if tensor.rows is not None:
            shape = shape_of(tensor, "an input")
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
    for tensor in tensors:
        if tensor.rows is None:
            shape = shape_of(tensor, "an input without rows")
            place = found.axis - (rank - len(shape))
            if place >= 0 and shape[place] != ONE:
                raise NotProvenError(
                    f"an input without rows has a size other than 1 at axis {found.axis}, along which the rows lie"
                )
    return found
