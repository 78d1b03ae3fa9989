"""Formats numbers for people: about three digits, a suitable unit, and a dash for unknown values."""

from __future__ import annotations

import math
from datetime import datetime

UNKNOWN = "–"  # noqa: RUF001


def number(value: float | None) -> str:
    """Formats a number: 1,234; 12.3; 0.12; 1.2 M."""
    if value is None or math.isnan(value):
        return UNKNOWN
    for limit, unit in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """Formats a duration: 420 µs; 1.23 ms; 4.5 s; 12 min."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if value >= 120:
        return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size or unit == "µs":
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 or scaled == 0 else f"{scaled:.3g} {unit}"
    raise AssertionError


def nanoseconds(value: float) -> str:
    """Formats a duration in nanoseconds, as `seconds` does."""
    return seconds(value / 1e9)


def money(value: float | None) -> str:
    """Formats an amount in any currency: 1,234; 12.35; 0.0042; 0.0000031."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    # At least two decimals; for small amounts two significant digits, down to a billionth.
    digits = max(2, min(9, 1 - math.floor(math.log10(abs(value)))))
    whole, _, rest = f"{value:,.{digits}f}".partition(".")
    return f"{whole}.{rest.rstrip('0').ljust(2, '0')}"


def size(value: float | None) -> str:
    """Formats a size in bytes: 1.5 MiB."""
    if value is None or math.isnan(value):
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 1000
                else f"{value:.0f} {unit}"
            )
        value /= 1024
    raise AssertionError


def percent(value: float | None) -> str:
    """Formats a share: 41 %; 0.3 %; 99.95 %."""
    if value is None or math.isnan(value):
        return UNKNOWN
    shown = value * 100
    if shown in (0, 100):
        return f"{shown:.0f} %"
    return (
        f"{float(f'{shown:.2f}'):g} %"
        if shown > 99 or shown < 1
        else f"{shown:.0f} %"
        if shown >= 10
        else f"{shown:.1f} %"
    )


def clock(ns: int) -> str:
    """Formats a time in ns since the Unix epoch as the time of day in the console's time zone."""
    return datetime.fromtimestamp(ns / 1e9).strftime("%H:%M:%S")


FILTERS = {
    "number": number,
    "seconds": seconds,
    "nanoseconds": nanoseconds,
    "money": money,
    "size": size,
    "percent": percent,
    "clock": clock,
}
