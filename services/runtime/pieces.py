"""Bytes that are stored in pieces, read front to back."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Sequence


class Pieces:
    """`left` bytes are still to be read."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.left = sum([len(piece) for piece in pieces])
        self._pieces = pieces
        self._index = 0
        self._offset = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes; not copied if they are a whole piece. Raises ValueError if fewer are left."""
        if count > self.left:
            raise ValueError("a field ends beyond its message")
        self.left -= count
        taken: list[bytes] = []
        while count:
            piece = self._pieces[self._index]
            end = min(self._offset + count, len(piece))
            taken.append(piece[self._offset : end])
            count -= end - self._offset
            self._offset = end
            if end == len(piece):
                self._index, self._offset = self._index + 1, 0
        return taken[0] if len(taken) == 1 else b"".join(taken)
