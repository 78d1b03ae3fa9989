"""Finds the most similar earlier request in this process, by the cosine similarity of their vectors.

The search is exact over a small set: one matrix-vector product, a millisecond at most.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MOST_VECTORS = 4096
_MOST_NUMBERS = 1 << 21
_MOST_GROUPS = 16

Vector = npt.NDArray[Any]


class Near(NamedTuple):
    """The key of the nearest vector, and the cosine similarity (1: same direction)."""

    key: bytes
    similarity: float


class SemanticIndex:
    """Vectors with the keys of their answers. Vectors of different groups are never compared; the oldest are evicted.

    Holds at most 16 groups, each with at most 8 MiB and 4,096 vectors.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[bytes, int], _Group] = OrderedDict()

    def nearest(self, group: bytes, vector: Vector) -> Near | None:
        """Returns the nearest vector; None if the group is empty or `vector` has no direction."""
        found = self._groups.get((group, vector.size))
        direction = unit(vector)
        if found is None or direction is None:
            return None
        self._groups.move_to_end((group, vector.size))
        return found.nearest(direction)

    def add(self, group: bytes, vector: Vector, key: bytes) -> None:
        """Adds a vector. Ignores a vector without direction or with more than 2,097,152 numbers."""
        direction = unit(vector)
        if direction is None or direction.size > _MOST_NUMBERS:
            return
        found = self._groups.get((group, direction.size))
        if found is None:
            found = self._groups[group, direction.size] = _Group(direction.size)
            if len(self._groups) > _MOST_GROUPS:
                self._groups.popitem(last=False)
        found.add(direction, key)


class _Group:
    """A ring buffer of unit vectors."""

    def __init__(self, size: int) -> None:
        self._vectors = np.empty((min(_MOST_VECTORS, _MOST_NUMBERS // size), size), np.float32)
        self._keys: list[bytes] = []
        self._indexes: dict[bytes, int] = {}
        self._next = 0

    def nearest(self, direction: Vector) -> Near:
        similarities = self._vectors[: len(self._keys)] @ direction
        index = int(similarities.argmax())
        return Near(self._keys[index], float(similarities[index]))

    def add(self, direction: Vector, key: bytes) -> None:
        if key in self._indexes:
            return
        if len(self._keys) < len(self._vectors):
            self._keys.append(key)
        else:
            del self._indexes[self._keys[self._next]]
            self._keys[self._next] = key
        self._vectors[self._next] = direction
        self._indexes[key] = self._next
        self._next = (self._next + 1) % len(self._vectors)


def unit(vector: Vector) -> Vector | None:
    """Returns the vector scaled to length 1; None if it has no direction."""
    flat = vector.astype(np.float32).ravel()
    length = float(np.linalg.norm(flat)) if flat.size else 0.0
    return flat / length if 0 < length < np.inf else None
