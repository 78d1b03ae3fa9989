"""Prices as operators set them."""

from __future__ import annotations

from collections.abc import Iterable

from services.ledger.reports.money import CURRENCIES
from services.ledger.reports.prices import PriceBook, placed
from services.ledger.storage import price_table
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.times import HOUR_MS
from services.runtime.errors import InvalidArgumentError, NotFoundError
from services.runtime.rpc.server import StartError

# One unit a microsecond; more is a mistake.
_MOST_NANO = 10**15
_MOST_SLOTS = 1024


class PriceList:
    """Of a ledger that counts in `currency`."""

    def __init__(self, database: Database, currency: str) -> None:
        self._database = database
        self.currency = currency

    async def begin(self, defaults: Iterable[Price]) -> None:
        """Gives worker types without any price their default. Raises StartError where the currency was another."""
        async with self._database.changing() as connection:
            await price_table.lock(connection)
            found = await price_table.currency(connection, self.currency)
            if found != self.currency:
                raise StartError(
                    f"this ledger counts in {found}, and RINGMESH_CURRENCY is {self.currency}: amounts of one cannot "
                    "be read as those of the other"
                )
            known = {price.worker_type for price in await price_table.all_prices(connection)}
            for price in defaults:
                if price.worker_type not in known:
                    await price_table.replace(connection, price.worker_type, [price])

    async def book(self, connection: Connection) -> PriceBook:
        """As it is in a transaction."""
        return PriceBook(await price_table.all_prices(connection), self.currency)

    async def set(self, price: Price, currency: str, *, supersede: bool) -> None:
        """Raises InvalidArgumentError, and AlreadyExistsError where it overlaps another."""
        if currency not in CURRENCIES:
            raise InvalidArgumentError(f"{currency!r} is no currency of ISO 4217, such as EUR", field="price.currency")
        if currency != self.currency:
            raise InvalidArgumentError(
                f"the price is in {currency}, and this ledger counts in {self.currency}", field="price.currency"
            )
        _check(price)
        async with self._database.changing() as connection:
            await price_table.lock(connection)
            existing = [one for one in await price_table.all_prices(connection) if one.worker_type == price.worker_type]
            await price_table.replace(connection, price.worker_type, placed(existing, price, supersede=supersede))

    async def delete(self, worker_type: str, from_ms: int) -> None:
        """Raises NotFoundError."""
        async with self._database.changing() as connection:
            await price_table.lock(connection)
            existing = [one for one in await price_table.all_prices(connection) if one.worker_type == worker_type]
            kept = [price for price in existing if price.from_ms != from_ms]
            if len(kept) == len(existing):
                raise NotFoundError(f"{worker_type!r} has no price that begins at {from_ms}", field="from_ms")
            await price_table.replace(connection, worker_type, kept)


def _check(price: Price) -> None:
    if not price.worker_type or len(price.worker_type) > 256 or not price.worker_type.isprintable():
        raise InvalidArgumentError("worker_type has 1 to 256 printable characters", field="price.worker_type")
    for name in ("hourly_nano", "power_milliwatts", "energy_nano_per_kwh"):
        if not 0 <= getattr(price, name) <= _MOST_NANO:
            raise InvalidArgumentError(
                f"{name} is {getattr(price, name)}; it is 0 to {_MOST_NANO}", field=f"price.{name}"
            )
    if not 0 < price.slots <= _MOST_SLOTS:
        raise InvalidArgumentError(f"slots is {price.slots}; it is 1 to {_MOST_SLOTS}", field="price.slots")
    for name in ("from_ms", "until_ms"):
        at_ms = getattr(price, name)
        if at_ms % HOUR_MS:
            raise InvalidArgumentError(f"{name} is not a whole hour of UTC", field=f"price.{name}")
        if at_ms > NO_END_MS:
            raise InvalidArgumentError(f"{name} is {at_ms}, which is no time", field=f"price.{name}")
    if price.from_ms >= price.until_ms:
        raise InvalidArgumentError("the period of a price ends after it begins", field="price.until_ms")
