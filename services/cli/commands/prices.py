"""`ringmesh prices`: what an hour of each type of worker costs, and since when."""

from __future__ import annotations

import time
from decimal import Decimal

from rich.markup import escape
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2

from services.cli.commands import tables
from services.cli.commands.cost import NANO, call, moment
from services.cli.errors import CommandError

_HOUR_MS = 3_600_000


def listing(address: str) -> Table:
    """Raises CommandError."""
    found = call(address, lambda stub: stub.ListPrices(ledger_pb2.ListPricesRequest()))
    table = tables.create("worker type", "from", "until", ">an hour", ">currency", ">slots", ">watts", ">a kWh")
    for price in found.prices:
        table.add_row(
            escape(price.worker_type),
            tables.utc(price.from_ms) if price.from_ms else "the beginning",
            tables.utc(price.until_ms) if price.until_ms else "",
            _decimal(price.hourly_nano),
            price.currency,
            str(price.slots),
            f"{price.power_milliwatts / 1000:g}" if price.power_milliwatts else "",
            _decimal(price.energy_nano_per_kwh) if price.energy_nano_per_kwh else "",
        )
    return table


def set_price(
    address: str,
    worker_type: str,
    hourly: str,
    currency: str,
    since: str | None,
    until: str | None,
    *,
    slots: int,
    watts: float,
    kwh: str,
    is_gpu: bool,
    supersede: bool,
) -> None:
    """Raises CommandError."""
    now = time.time()
    price = ledger_pb2.Price(
        worker_type=worker_type,
        # By default from this hour on.
        from_ms=moment(since, now) if since is not None else int(now * 1000) // _HOUR_MS * _HOUR_MS,
        until_ms=moment(until, now),
        hourly_nano=nano(hourly),
        currency=currency,
        device=ledger_pb2.DEVICE_GPU if is_gpu else ledger_pb2.DEVICE_CPU,
        slots=slots,
        power_milliwatts=round(watts * 1000),
        energy_nano_per_kwh=nano(kwh),
    )
    request = ledger_pb2.SetPriceRequest(price=price, supersede=supersede)
    call(address, lambda stub: stub.SetPrice(request))


def delete(address: str, worker_type: str, since: str) -> None:
    """Raises CommandError."""
    request = ledger_pb2.DeletePriceRequest(worker_type=worker_type, from_ms=moment(since, time.time()))
    call(address, lambda stub: stub.DeletePrice(request))


def nano(amount: str) -> int:
    """Nano-units of a decimal number, exactly. Raises CommandError."""
    try:
        exact = Decimal(amount) * NANO
        if exact != exact.to_integral_value() or not 0 <= exact < 2**63:
            raise ValueError
    except (ArithmeticError, ValueError):
        raise CommandError(f"{amount!r} is no amount with at most nine decimals, such as 0.38") from None
    return int(exact)


def _decimal(nano: int) -> str:
    return f"{Decimal(nano) / NANO:f}"
