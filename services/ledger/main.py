"""The ledger as a process: PostgreSQL, the writer, reports; drain."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from urllib.parse import quote

from services.ledger.api.metrics import LedgerMetrics
from services.ledger.api.service import LedgerService
from services.ledger.ingest.writer import Writer
from services.ledger.reports.budgets import BudgetList
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.report_cache import ReportCache
from services.ledger.reports.reports import Reports
from services.ledger.settings import LedgerSettings
from services.ledger.storage.database import Database
from services.ledger.storage.embedded import EmbeddedPostgres
from services.ledger.storage.partitions import Partitions
from services.ledger.upkeep import keep_partitions, open_database
from services.runtime.process.process import publish, run, set_title
from services.runtime.rpc.access import credential_of
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.spans import this_process
from services.runtime.telemetry.supervisor import BACKGROUND


async def serve(settings: LedgerSettings, stopping: asyncio.Event) -> None:
    """Serves until `stopping`, then drains. NOT_SERVING until the database is ready."""
    postgres = EmbeddedPostgres(settings.state_dir / "postgres") if settings.database_url is None else None
    url = settings.database_url
    if postgres is not None:
        await postgres.start()
        url = f"postgresql://ringmesh@/postgres?host={quote(postgres.socket_folder, safe='')}"
    assert url is not None
    try:
        await _serve(settings, Database(url, settings.replica_url), stopping)
    finally:
        if postgres is not None:
            await postgres.stop()


async def _serve(settings: LedgerSettings, database: Database, stopping: asyncio.Event) -> None:
    partitions = Partitions(settings.retention)
    writer = Writer(database, partitions)
    prices = PriceList(database, settings.currency)
    cache = ReportCache(settings.cache_address, credential_of(settings.key_secret), settings.service_tls())
    reports = Reports(database, prices, cache, settings.retention)
    budgets = BudgetList(database, prices)
    service = LedgerService(database, partitions, writer, prices, reports, budgets).service()
    server = settings.create_server([service], settings.access())
    metrics = Metrics()
    ledger_metrics = LedgerMetrics(database, writer, cache, budgets)
    metrics.add(ledger_metrics.samples)
    metrics.add(server.calls.samples)
    port = await server.start()
    exposition = await publish(settings, metrics, this_process("ledger"))
    set_title("ledger", settings.address, port)
    tasks: list[asyncio.Task[None]] = []
    try:
        opening = asyncio.ensure_future(
            open_database(database, partitions, prices, settings.default_prices(), time.time)
        )
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait((opening, stopped), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            writer.start()
            tasks = [
                BACKGROUND.start("partitions", partial(keep_partitions, database, partitions, time.time)),
                BACKGROUND.start("budgets", ledger_metrics.look),
            ]
            server.set_serving(True)
            await stopped
        opening.cancel()
    finally:
        await server.stop(settings.drain_seconds)
        await writer.close()
        await BACKGROUND.end(*tasks)
        exposition.close()
        await cache.close()
        await database.close()


def main() -> None:
    run(LedgerSettings, serve)
