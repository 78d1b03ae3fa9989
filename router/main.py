"""The router as a process: ring, fleet, mesh, dispatcher, service; serve; drain."""

from __future__ import annotations

import asyncio
import time

from cache.keys import RequestHasher
from cache.metrics import CacheMetrics
from cache.service import CacheService
from router.admission.concurrency_limit import ConcurrencyLimits
from router.admission.quotas import Quotas
from router.audit import Audit
from router.control import FleetControl
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from router.membership import Listing
from router.operator_service import OperatorService
from router.request_metrics import RequestMetrics
from router.retry_budget import RetryBudget
from router.service import InferenceService
from router.settings import RouterSettings
from services.runtime.exposition import MetricsServer
from services.runtime.live_settings import LiveSettings
from services.runtime.metrics import Metrics
from services.runtime.process import run
from services.runtime.process_metrics import ProcessMetrics
from services.runtime.request_log import RequestLog
from services.runtime.server import Server
from services.runtime.tracing import create_tracer


async def serve(settings: RouterSettings, stopping: asyncio.Event) -> None:
    """Serves until `stopping`, then drains."""
    tracer = create_tracer(
        "router", ratio=settings.trace_ratio, folder=settings.trace_dir, otlp_endpoint=settings.otlp_endpoint
    )
    mesh = settings.create_mesh()
    hasher = RequestHasher(settings.key_secret, lambda tenant: mesh.purges.epochs.tenant(tenant))
    fleet = Fleet(
        [Listing(address) for address in settings.workers],
        lambda ready: server.set_serving(ready and not stopping.is_set()),
        clock=time.monotonic,
    )
    requests = RequestMetrics()
    limits = ConcurrencyLimits(settings.queue_seconds, time.monotonic)
    dispatcher = Dispatcher(fleet, limits, RetryBudget(time.monotonic))
    quotas = Quotas(settings.quotas, time.monotonic)
    audit = Audit(dispatcher, settings.audit_share, time.monotonic)
    request_log = RequestLog(time.monotonic)
    inference = InferenceService(fleet, mesh, hasher, dispatcher, tracer, requests, request_log, quotas, audit)
    more = {**FleetControl(fleet, requests, audit).handlers(), **LiveSettings(tracer).handlers()}
    cache = CacheService(mesh)
    server = Server(
        settings.engine,
        settings.address,
        [
            inference.service(lambda: server.health.serving, more),
            OperatorService(fleet, hasher, audit).service(),
            cache.service(),
        ],
        max_message_bytes=settings.max_message_bytes,
        max_connection_age=settings.max_connection_age_seconds,
        share_port=settings.share_port,
    )
    metrics = Metrics()
    for part in (requests, FleetMetrics(fleet), CacheMetrics(mesh), audit, tracer, request_log):
        metrics.add(part.samples)
    exposition = MetricsServer(settings.metrics_address, metrics)
    await server.start()
    await exposition.start()
    ProcessMetrics("router", settings.engine, metrics).start()
    mesh.start()
    fleet.start()
    marking = asyncio.create_task(requests.keep_marking())
    await stopping.wait()
    cache.close()
    marking.cancel()
    await server.stop(settings.drain_seconds)
    exposition.close()
    await fleet.close()
    await mesh.close()
    await tracer.close()


def main() -> None:
    """`python -m router`."""
    run(RouterSettings, serve)
