"""What a microsecond of a worker costs, by type and time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.times import HOUR_MS, text
from services.runtime.errors import AlreadyExistsError

# The worker type of routers, which hits are charged for.
ROUTER: Final = "router"
_HOUR_US = HOUR_MS * 1000
_MICRO = 1_000_000


class PriceBook:
    """All prices, in `currency`. Rates are integers over one denominator: nothing is rounded before the end."""

    def __init__(self, prices: Iterable[Price], currency: str) -> None:
        self.currency = currency
        self.prices = tuple(prices)
        self._by_type: dict[str, list[Price]] = {}
        for price in self.prices:
            self._by_type.setdefault(price.worker_type, []).append(price)
        self._slots = math.lcm(*(price.slots for price in self.prices)) if self.prices else 1
        self.denominator = _HOUR_US * _MICRO * self._slots

    def find(self, worker_type: str, at_ms: int) -> Price | None:
        for price in self._by_type.get(worker_type, ()):
            if price.from_ms <= at_ms < price.until_ms:
                return price
        return None

    def rate(self, price: Price) -> int:
        """Numerator of nano-units for a microsecond of compute."""
        hourly = price.hourly_nano * _MICRO + price.power_milliwatts * price.energy_nano_per_kwh
        return hourly * (self._slots // price.slots)

    def boundaries(self, from_ms: int, until_ms: int) -> list[int]:
        """Where prices change within the range, with its ends: between two of them each price is one."""
        changes = {end for price in self.prices for end in (price.from_ms, price.until_ms)}
        return sorted({from_ms, until_ms, *(at for at in changes if from_ms < at < until_ms)})


def placed(existing: Sequence[Price], new: Price, *, supersede: bool) -> list[Price]:
    """The prices of a type with `new` among them. Raises AlreadyExistsError where it overlaps and may not supersede.

    To supersede ends what holds at its start, and replaces what begins later within its period.
    """
    kept = []
    for price in existing:
        if price.until_ms <= new.from_ms or price.from_ms >= new.until_ms:
            kept.append(price)
            continue
        if not supersede:
            raise AlreadyExistsError(
                f"{new.worker_type!r} has a price {period(price.from_ms, price.until_ms)}, which overlaps "
                f"{period(new.from_ms, new.until_ms)}; end it first, or supersede it",
                field="price.from_ms",
            )
        if price.from_ms < new.from_ms:
            kept.append(price._replace(until_ms=new.from_ms))
        if price.from_ms < new.until_ms < price.until_ms:
            kept.append(price._replace(from_ms=new.until_ms))
    return sorted([*kept, new], key=lambda price: price.from_ms)


def period(from_ms: int, until_ms: int) -> str:
    begin = "from the beginning" if from_ms <= 0 else f"from {text(from_ms)}"
    return begin if until_ms >= NO_END_MS else f"{begin} until {text(until_ms)}"
