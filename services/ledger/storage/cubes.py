"""Which sums are kept beside those of each series, for reports that group by little.

A month of 200 tenants and 50 models has 300,000 cells of days by series, and 6,000 by tenant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

# Names that a cube keeps, beside the worker type, which prices need. The one with the fewest cells first.
CUBES: Final = {"region": ("region",), "model": ("model", "version"), "tenant": ("tenant",)}


def smallest(names: Iterable[str]) -> str:
    """The cube that keeps all of `names`; "" where only the series do."""
    wanted = set(names)
    for cube, kept in CUBES.items():
        if wanted <= set(kept):
            return cube
    return ""
