"""Divides whole numbers, such as times and amounts of money, without a rest."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Sequence


def apportioned(weights: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to `weights`, by largest remainder: the parts add up to it exactly.

    All zero if the weights are; then `total` must be, too. Nothing is negative.
    """
    if len(weights) == 1:
        return [total]
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    parts = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: -(weights[place] * total % whole))
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts
