"""Quantities times prices: numerators of money over the price book's denominator, rounded only when all are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.ledger.reports.money import rounded
from services.ledger.reports.prices import ROUTER, PriceBook, period
from services.ledger.reports.usage_query import Sums
from services.ledger.storage.price_table import Price
from services.ledger.storage.rollups import MEASURES
from services.runtime.errors import FailedPreconditionError

_COMPUTE, _SAVED, _ERROR, _ROUTER_TIME = (
    MEASURES.index(name) for name in ("compute_us", "saved_us", "error_us", "router_us")
)
_MOST_NAMED = 5


class Amounts(NamedTuple):
    """Numerators of money. `cost` holds `error`."""

    cost: int = 0
    saved: int = 0
    error: int = 0


class Rating:
    """Rates what was used in the segments between `boundaries`, and remembers where a price was missing."""

    def __init__(self, book: PriceBook, boundaries: Sequence[int]) -> None:
        self._book = book
        self._boundaries = boundaries
        self._rates: dict[tuple[str, int], int] = {}
        self._missing: set[tuple[str, int]] = set()

    def amounts(self, sums: Sums) -> Amounts:
        """Of compute at the worker type's rate, and of the router's time at the routers'."""
        measures, segment = sums.measures, sums.segment
        compute, saved, error = measures[_COMPUTE], measures[_SAVED], measures[_ERROR]
        cost = self.rated(ROUTER, segment, measures[_ROUTER_TIME])
        if not (compute or saved):
            return Amounts(cost)
        rate = self._rate(sums.worker_type, segment)
        return Amounts(cost + compute * rate, saved * rate, error * rate)

    def columns(
        self, segments: Sequence[int], worker_types: Sequence[str], measures: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int], list[int]]:
        """The numerators of `amounts`, as columns, of rows whose sums are columns."""
        compute, saved, error, router = (measures[place] for place in (_COMPUTE, _SAVED, _ERROR, _ROUTER_TIME))
        rates = [
            self._rate(worker_type, segment) if us or saved_us else 0
            for worker_type, segment, us, saved_us in zip(worker_types, segments, compute, saved, strict=True)
        ]
        of_routers = [self._rate(ROUTER, segment) if us else 0 for segment, us in zip(segments, router, strict=True)]
        costs = zip(compute, rates, router, of_routers, strict=True)
        return (
            [us * rate + router_us * router_rate for us, rate, router_us, router_rate in costs],
            [us * rate for us, rate in zip(saved, rates, strict=True)],
            [us * rate for us, rate in zip(error, rates, strict=True)],
        )

    def rated(self, worker_type: str, segment: int, compute_us: int) -> int:
        """Of time that a worker type computed."""
        return compute_us * self._rate(worker_type, segment) if compute_us else 0

    def nano(self, numerator: int) -> int:
        """In nano-units, rounded."""
        return rounded(numerator, self._book.denominator)

    def price(self, worker_type: str, segment: int) -> Price | None:
        return self._book.find(worker_type, self._boundaries[segment])

    def warnings(self, *, allow_unpriced: bool) -> list[str]:
        """What has no price. Raises FailedPreconditionError unless that is allowed."""
        missing = [
            f"no price for worker type {worker_type!r} {period(*self._boundaries[segment : segment + 2])}"
            for worker_type, segment in sorted(self._missing)
        ]
        if missing and not allow_unpriced:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise FailedPreconditionError(
                f"{'; '.join(missing[:_MOST_NAMED])}{more}. Set one with `ringmesh prices set`, or ask for a report "
                "that leaves it out",
                kind="missing_price",
            )
        return [f"{one}: it is not in the cost" for one in missing]

    def _rate(self, worker_type: str, segment: int) -> int:
        key = (worker_type, segment)
        rate = self._rates.get(key)
        if rate is None:
            price = self.price(worker_type, segment)
            if price is None:
                self._missing.add(key)
            rate = self._rates[key] = 0 if price is None else self._book.rate(price)
        return rate
