"""Abstract values: the facts about a tensor that hold in all batches. B is the number of rows in a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from services.inference.execution.batch_proof.sizes import ONE, ROWS, Size

Shape = tuple[Size, ...]
# Elements are int, float or bool, or a Size if they have no single value.
Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowAxis:
    """The place of the rows: index (o * B + b) * inner + i of dimension `axis` belongs to row b, for o < `outer`."""

    axis: int
    outer: Size = ONE
    inner: Size = ONE

    @property
    def size(self) -> Size:
        return self.outer * ROWS * self.inner

    def at(self, axis: int) -> RowAxis:
        return replace(self, axis=axis)


class Content(Enum):
    """The kind of the elements of a tensor with rows."""

    OWN = "computed from their row"
    POSITION = "the number of their row, times `stride`"
    POSITION_IN_ALL = "indices into all rows laid end to end, `stride` each, that lie in their own row"
    OF_POSITION = "computed from the number of their row, so that only their shape may be used"
    POSITION_FIRST = "indices, of which the first is the number of their row"


@dataclass(frozen=True, slots=True)
class Tensor:
    """The facts about one tensor.

    With `rows`, elements of row b depend only on row b of the inputs, and B is a factor of that dimension only.
    Without `rows`, the tensor is the same in all batches, unless B is a factor of some of its `values`.
    `shape`: None if not even the rank is known; always known with `rows`. `values`: the known elements of small tensors
    of whole numbers, truth values or floats; only without `rows`. `below`: the elements are whole numbers from 0 to
    below this size.
    """

    shape: Shape | None
    rows: RowAxis | None = None
    values: Values | None = None
    content: Content = Content.OWN
    stride: Size = ONE
    below: Size | None = None

    @property
    def counts_rows(self) -> bool:
        return self.values is not None and any(
            isinstance(value, Size) and value.counts_rows for value in self.values.flat
        )

    @property
    def independent(self) -> bool:
        return self.rows is None and not self.counts_rows


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value without known facts. `reason` names the node that causes this."""

    reason: str


Value = Tensor | Unknown


def known(values: Any) -> Tensor:
    """A tensor of known or symbolic elements."""
    array = np.asarray(values, object)
    return Tensor(tuple(Size(size) for size in array.shape), values=array)


def as_size(value: Any) -> Size:
    return value if isinstance(value, Size) else Size(int(value))


def plain(value: Any) -> Any:
    """A Size without symbols as an int; other values unchanged."""
    return value.coefficient if isinstance(value, Size) and not value.symbols else value
