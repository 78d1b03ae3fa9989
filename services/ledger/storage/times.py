"""Times in milliseconds since the Unix epoch, and as PostgreSQL and people have them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
# Weeks begin on Thursdays, as the epoch does.
WEEK_MS = 7 * DAY_MS

Day = TypeVar("Day", date, datetime)


def utc(at_ms: float) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def day_of(at_ms: int) -> date:
    """Of UTC."""
    return utc(at_ms).date()


def midnight_ms(day: date) -> int:
    return (day - date(1970, 1, 1)).days * DAY_MS


def week_of(day: date) -> date:
    """Its first day."""
    return day_of(midnight_ms(day) // WEEK_MS * WEEK_MS)


def next_month(day: Day) -> Day:
    """The first day of the month after that of `day`."""
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1)


def text(at_ms: int) -> str:
    try:
        return f"{utc(at_ms):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{at_ms} ms"
