"""Formats numbers for people: about three digits, a suitable unit, and a dash for unknown values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps

UNKNOWN = "–"  # noqa: RUF001


def _known(format_value: Callable[[float], str]) -> Callable[[float | None], str]:
    """Makes `format_value` return UNKNOWN for None and NaN."""

    @wraps(format_value)
    def formatted(value: float | None) -> str:
        return UNKNOWN if value is None or math.isnan(value) else format_value(value)

    return formatted


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Formats a value with three digits in the first unit that is not larger than it, or in the last one."""
    size, unit = next((one for one in units if abs(value) >= one[0]), units[-1])
    scaled = value / size
    return f"{scaled:.0f} {unit}" if abs(scaled) >= 100 else f"{scaled:.3g} {unit}"


@_known
def number(value: float) -> str:
    """Formats a number: 1,234; 12.3; 0.12; 1.2 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@_known
def seconds(value: float) -> str:
    """Formats a duration: 420 µs; 1.23 ms; 4.5 s; 12 min."""
    if value >= 120:
        return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
    return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def nanoseconds(value: float) -> str:
    return seconds(value / 1e9)


@_known
def money(value: float) -> str:
    """Formats an amount in any currency: 1,234; 12.35; 0.0042; 0.0000031."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    # At least two decimals; for small amounts two significant digits, down to a billionth.
    digits = max(2, min(9, 1 - math.floor(math.log10(abs(value)))))
    whole, _, rest = f"{value:,.{digits}f}".partition(".")
    return f"{whole}.{rest.rstrip('0').ljust(2, '0')}"


@_known
def size(value: float) -> str:
    """Formats a size in bytes: 1.5 MiB."""
    return _scaled(value, ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")))


@_known
def percent(value: float) -> str:
    """Formats a share: 41 %; 0.3 %; 99.95 %."""
    shown = value * 100
    if shown in (0, 100):
        return f"{shown:.0f} %"
    if shown < 1 or shown > 99:
        return f"{float(f'{shown:.2f}'):g} %"
    return f"{shown:.0f} %" if shown >= 10 else f"{shown:.1f} %"


def clock(ns: int) -> str:
    """Formats a time in ns since the Unix epoch as the time of day in the console's time zone."""
    return datetime.fromtimestamp(ns / 1e9).strftime("%H:%M:%S")


def attribute(value: object) -> str:
    """Formats the value of a span attribute: 3.6e-09, not the exact value of the float."""
    return f"{value:.9g}" if isinstance(value, float) else str(value) or UNKNOWN


FILTERS = {one.__name__: one for one in (number, seconds, nanoseconds, money, size, percent, clock, attribute)}
