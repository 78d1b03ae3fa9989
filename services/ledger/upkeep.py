"""Opens the database, however long that takes, and keeps its partitions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from services.ledger.reports.price_list import PriceList
from services.ledger.storage.database import FAILURES, Database
from services.ledger.storage.migrations import MigrationError
from services.ledger.storage.partitions import Partitions
from services.ledger.storage.price_table import Price
from services.ledger.storage.times import utc
from services.runtime.errors import UnavailableError

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0
_EVERY_SECONDS = 600.0


async def open_database(
    database: Database, partitions: Partitions, prices: PriceList, defaults: list[Price], clock: Callable[[], float]
) -> None:
    """Returns when the database is ready. Raises StartError where waiting cannot help."""
    pause = _FIRST_PAUSE_SECONDS
    logged = ""
    while True:
        try:
            if not database.is_open:
                await database.open()
            await partitions.prepare(database, utc(clock() * 1000))
            await prices.begin(defaults)
            return
        except (*FAILURES, MigrationError, UnavailableError) as error:
            reason = f"{type(error).__name__}: {error}"
            # A server that starts refuses for a moment: that is no news.
            if reason != logged and pause > 10 * _FIRST_PAUSE_SECONDS:
                log.warning("the database is not ready, trying on: %s", reason)
                logged = reason
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)


async def keep_partitions(database: Database, partitions: Partitions, clock: Callable[[], float]) -> None:
    """Until cancelled."""
    while True:
        await partitions.prepare(database, utc(clock() * 1000))
        if dropped := await partitions.drop_old(database, utc(clock() * 1000)):
            log.info("dropped what is not kept any longer: %s", ", ".join(dropped))
        await asyncio.sleep(_EVERY_SECONDS)
