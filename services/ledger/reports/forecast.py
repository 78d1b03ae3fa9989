"""What the current month will cost, from the days before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from statistics import fmean, stdev

from services.ledger.storage.times import next_month

# So that each weekday is seen twice, at least.
_WEEKS_FROM_DAYS = 14
HISTORY_DAYS = 28
# 8 of 10 of a normal distribution lie within so many standard deviations.
_SPREAD = 1.2816


@dataclass(frozen=True, slots=True)
class Forecast:
    """In nano-units, of the whole month."""

    expected_nano: int
    low_nano: int
    high_nano: int
    basis: str


def forecast(daily_nano: Mapping[date, int], today: date, spent_nano: int, day_share: float) -> Forecast:
    """`daily_nano` has the cost of days before today, 0 where nothing ran; `spent_nano` is the month's up to now.

    `day_share` is the part of today that is over, 0 to 1.
    """
    first = min(daily_nano, default=today)
    days = [first + timedelta(days=place) for place in range((today - first).days)][-HISTORY_DAYS:]
    costs = [daily_nano.get(day, 0) for day in days]
    remaining = [today + timedelta(days=place) for place in range(1, (next_month(today) - today).days)]
    if not days:
        rate = spent_nano / max(day_share, 1 / 24)
        rest = rate * (1 - day_share + len(remaining))
        return Forecast(round(spent_nano + rest), spent_nano, round(spent_nano + 2 * rest), "today alone")
    if len(days) >= _WEEKS_FROM_DAYS:
        basis = f"the last {len(days)} days, by day of the week"
        means = {weekday: fmean(_of_weekday(days, costs, weekday)) for weekday in range(7)}
    else:
        basis = f"the mean of the last {len(days)} day{'s'[: len(days) > 1]}"
        means = dict.fromkeys(range(7), fmean(costs))
    rest = means[today.weekday()] * (1 - day_share) + sum(means[day.weekday()] for day in remaining)
    errors = [cost - means[day.weekday()] for day, cost in zip(days, costs, strict=True)]
    deviation = stdev(errors) if len(errors) > 1 else rest / max(len(remaining), 1)
    # The days' own variance, and that of their mean, which all days to come share.
    ahead = len(remaining) + 1 - day_share
    spread = _SPREAD * deviation * math.sqrt(ahead + ahead * ahead / len(days))
    return Forecast(
        round(spent_nano + rest), round(spent_nano + max(rest - spread, 0)), round(spent_nano + rest + spread), basis
    )


def _of_weekday(days: Sequence[date], costs: Sequence[int], weekday: int) -> list[int]:
    return [cost for day, cost in zip(days, costs, strict=True) if day.weekday() == weekday]
