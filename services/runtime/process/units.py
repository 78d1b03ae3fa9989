"""Sizes and durations with units, in settings and flags."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_BYTES |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}  # as Kubernetes writes them
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """Reads "256MiB" or "1.5 GB", or a plain number of bytes. Raises ValueError."""
    return int(_parse(text, _BYTES, "a size is a number of bytes, or a number with kB, MB, GB, KiB, MiB or GiB"))


def parse_seconds(text: str) -> float:
    """Reads "5m" or "250 ms", or a plain number of seconds. Raises ValueError."""
    return _parse(text, _SECONDS, "a duration is a number of seconds, or a number with ms, s, m, h or d")


def _parse(text: str, units: Mapping[str, float], expected: str) -> float:
    found = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?) *([a-z]*)", text.strip().lower())
    if found is None or found[2] not in {"", *units}:
        raise ValueError(expected)
    try:
        value = float(found[1]) * units.get(found[2], 1)
    except ValueError:
        raise ValueError(expected) from None
    if not math.isfinite(value):
        raise ValueError(expected)
    return value
