"""Symbolic sizes: products of a whole number, the number of rows B, and sizes that do not depend on B."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

# The symbol of B. The symbols of sizes that cannot be below 0 are positive, all others negative.
_B = 0
_MOST = 1 << 63
# Limit for one product. Without it a short graph that squares a size repeatedly would fill the memory.
_MOST_SYMBOLS = 32


@dataclass(frozen=True, slots=True)
class Size:
    """`coefficient` times the `symbols`, which are sorted. Symbols other than B have one value in all batches."""

    coefficient: int
    symbols: tuple[int, ...] = ()

    @property
    def counts_rows(self) -> bool:
        return _B in self.symbols

    @property
    def known(self) -> int | None:
        return None if self.symbols else self.coefficient

    @property
    def nonnegative(self) -> bool:
        return self.coefficient >= 0 and all(symbol >= 0 for symbol in self.symbols)

    def __mul__(self, other: Size) -> Size:
        """The product. Raises OverflowError if no tensor can have this size."""
        coefficient = self.coefficient * other.coefficient
        if coefficient == 0:
            return Size(0)
        if abs(coefficient) >= _MOST or len(self.symbols) + len(other.symbols) > _MOST_SYMBOLS:
            raise OverflowError("a size has too many factors")
        return Size(coefficient, tuple(sorted((*self.symbols, *other.symbols))))

    def divided_by(self, other: Size) -> Size | None:
        """The exact quotient; None if it is not a product of a whole number and symbols."""
        if other.coefficient == 0 or self.coefficient % other.coefficient:
            return None
        left = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in left:
                return None
            left.remove(symbol)
        return Size(self.coefficient // other.coefficient, tuple(left))


ONE = Size(1)
ROWS = Size(1, (_B,))


def product(sizes: Iterable[Size]) -> Size:
    result = ONE
    for size in sizes:
        result *= size
    return result


class Symbols:
    """Makes symbols. Equal keys give the same symbol, because equal computations have equal results."""

    def __init__(self) -> None:
        self._made = 0
        self._by_key: dict[Hashable, Size] = {}
        self._cut: dict[Size, Size] = {}

    @property
    def made(self) -> int:
        """The number of symbols made so far. Symbols made later have larger numbers."""
        return self._made

    def size(self, key: Hashable = None) -> Size:
        """An unknown size, 0 or more."""
        return self._symbol(1, key)

    def number(self, key: Hashable = None) -> Size:
        return self._symbol(-1, key)

    def cut(self, whole: Size, end: Size) -> Size:
        """The size of a slice from 0 to `end` of an axis of size `whole`."""
        made = self.size(("cut", whole, end))
        if whole.known is not None and whole.known > 1:
            self._cut[made] = end
        return made

    def broadcast(self, one: Size, other: Size) -> Size:
        """The broadcast of two unknown sizes, which are equal or one of them is 1."""
        for size, end in ((one, other), (other, one)):
            if self._cut.get(size) == end:
                return end  # if the cut were shorter than `end`, the sizes would not match
        return self.size(("broadcast", frozenset((one, other))))

    def _symbol(self, sign: int, key: Hashable) -> Size:
        if key is not None and (known := self._by_key.get((sign, key))) is not None:
            return known
        self._made += 1
        made = Size(1, (sign * self._made,))
        if key is not None:
            self._by_key[sign, key] = made
        return made


def made_after(size: Size, made: int) -> bool:
    """Whether `size` has a symbol that was made after the first `made` symbols."""
    return any(abs(symbol) > made for symbol in size.symbols)
