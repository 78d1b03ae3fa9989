"""Which roll-ups make up a range of time: weeks where whole weeks fit, shorter ones at the ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from services.ledger.storage.rollups import GRAINS


class Piece(NamedTuple):
    """Cells of one grain, within one of the segments that prices cut a range into."""

    segment: int
    grain: str
    from_ms: int
    until_ms: int


def pieces(boundaries: Sequence[int], weeks_until_ms: int = 0) -> list[Piece]:
    """Of the segments between `boundaries`, which are multiples of a minute; with weeks before `weeks_until_ms`."""
    grains = [*GRAINS][::-1]
    found: list[Piece] = []
    for segment, (begin, end) in enumerate(pairwise(boundaries)):
        middle = min(max(begin, weeks_until_ms), end)
        found += (Piece(segment, *part) for part in _split(begin, middle, grains))
        found += (Piece(segment, *part) for part in _split(middle, end, grains[1:]))
    return found


def _split(begin: int, end: int, grains: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """With the coarsest of `grains` in the middle and the others at both ends."""
    if begin >= end:
        return
    grain, *finer = grains
    width = GRAINS[grain]
    first, last = -(-begin // width) * width, end // width * width
    if not finer:
        yield grain, begin, end
    elif first >= last:
        yield from _split(begin, end, finer)
    else:
        yield from _split(begin, first, finer)
        yield grain, first, last
        yield from _split(last, end, finer)
