"""The console process: receives spans, scrapes metrics, polls the fleet, serves pages, and drains."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from services.console import app
from services.console import metrics as console_metrics
from services.console.data.fleet_watch import FleetWatch
from services.console.data.history import History
from services.console.data.ledger import LedgerReports
from services.console.data.otlp import TraceReceiver
from services.console.data.scraper import Scraper
from services.console.data.sources import Sources
from services.console.data.trace_store import TraceStore
from services.console.http_server import HttpServer
from services.console.settings import ConsoleSettings
from services.runtime.process.process import publish, run, set_title
from services.runtime.rpc.access import credential_of
from services.runtime.telemetry.metrics import Metrics


async def serve(settings: ConsoleSettings, stopping: asyncio.Event) -> None:
    traces = TraceStore(max_bytes=settings.trace_store_bytes, max_traces=settings.trace_store_traces)
    history = History(time.time)
    access = settings.access()
    credential, tls = credential_of(settings.key_secret), settings.service_tls()
    scraper = Scraper(settings.metrics_targets, history, tls)
    fleet = FleetWatch(settings.routers, settings.cache_address, credential, tls)
    ledger = LedgerReports(settings.ledger_address, credential, tls=tls)
    sources = Sources(fleet, history, scraper, traces, settings.trace_ui, ledger)
    metrics = Metrics()
    metrics.add(partial(console_metrics.samples, traces))
    site = app.create(sources, stopping, settings.console_hosts, access)
    pages = HttpServer(site, settings.http_address, settings.tls_files())
    receiver = settings.create_server([TraceReceiver(traces).service()], access)
    metrics.add(receiver.calls.samples)
    exposition = await publish(settings, metrics)
    pages.start()
    set_title("console", settings.http_address)
    await receiver.start()
    fleet.start()
    scraper.start()
    receiver.set_serving(True)
    await stopping.wait()
    await receiver.stop(settings.drain_seconds)
    await pages.stop(settings.drain_seconds)
    exposition.close()
    scraper.close()
    await fleet.close()
    await ledger.close()


def main() -> None:
    run(ConsoleSettings, serve)
