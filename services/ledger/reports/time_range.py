"""The range of a report, as asked for and as it can be answered."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.ledger.storage.partitions import Retention
from services.ledger.storage.price_table import NO_END_MS
from services.ledger.storage.times import DAY_MS, HOUR_MS, MINUTE_MS, day_of, midnight_ms, text, utc
from services.runtime.errors import InvalidArgumentError

_MOST_DAYS = 1100


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Milliseconds since the Unix epoch, from the first on and before the second."""

    from_ms: int
    until_ms: int

    @property
    def times(self) -> tuple[datetime, datetime]:
        return utc(self.from_ms), utc(self.until_ms)

    @property
    def before(self) -> TimeRange:
        """Of equal length, right before it."""
        return TimeRange(2 * self.from_ms - self.until_ms, self.from_ms)


def asked(from_ms: int, until_ms: int, now_ms: int, grain_ms: int = 1) -> TimeRange:
    """`until_ms` 0 is now. Rounded down to `grain_ms`, and now up, so that what just happened is in it.

    Raises InvalidArgumentError.
    """
    for field, at_ms in (("from_ms", from_ms), ("until_ms", until_ms)):
        if at_ms > NO_END_MS:
            raise InvalidArgumentError(f"{field} is {at_ms}, which is no time", field=field)
    end = until_ms // grain_ms * grain_ms if until_ms else -(-(now_ms + 1) // grain_ms) * grain_ms
    begin = from_ms // grain_ms * grain_ms
    if begin >= end:
        raise InvalidArgumentError(
            f"the range from {text(from_ms)} until {text(until_ms or now_ms)} is empty", field="from_ms"
        )
    if end - begin > _MOST_DAYS * DAY_MS:
        raise InvalidArgumentError(
            f"the range from {text(from_ms)} has {(end - begin) // DAY_MS} days; a report covers at most {_MOST_DAYS}",
            field="from_ms",
        )
    return TimeRange(begin, end)


def covered(wanted: TimeRange, retention: Retention, now_ms: int) -> TimeRange:
    """Rounded down to a minute, or to an hour where minutes are not kept any more."""
    first_minute_ms = midnight_ms(retention.first_minute_day(day_of(now_ms)))

    def rounded(at_ms: int) -> int:
        grain = MINUTE_MS if at_ms >= first_minute_ms else HOUR_MS
        return at_ms // grain * grain

    begin, end = rounded(wanted.from_ms), rounded(wanted.until_ms)
    if begin >= end:
        raise InvalidArgumentError(
            "the range is shorter than an hour, and minutes of that time are not kept any more", field="from_ms"
        )
    return TimeRange(begin, end)
