"""The router process: builds the fleet, mesh, dispatcher and services, serves until stopped, then drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from cache.api.metrics import cache_samples
from cache.api.service import CacheService
from cache.keys.epochs import MODELS
from cache.keys.keys import RequestHasher
from cache.keys.purge_sweep import PurgeSweep
from cache.mesh import Mesh
from cache.tiers.entry import EntryFrames
from cache.tiers.evictions import Evictions
from router.accounting.budgets import Budgets
from router.accounting.cost import CostMetrics, Prices
from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from router.accounting.meter import Meter, worker_type
from router.accounting.request_metrics import RequestMetrics
from router.accounting.slo import Slo
from router.accounting.usage import Up, Usage
from router.admission.concurrency_limit import ConcurrencyLimits
from router.admission.quotas import Quotas
from router.admission.tenant_limits import TenantLimits
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.membership.fleet import Fleet
from router.operator.agreement import Agreement
from router.operator.control import FleetControl
from router.operator.service import OperatorService
from router.request.audit import Audit
from router.request.keyer import Keyer
from router.request.path import RequestPath
from router.request.replies import Replies
from router.request.service import InferenceService
from router.settings import RouterSettings
from router.transport.grpc_channel import GrpcChannel
from services.runtime.machine import cores, huge_pages, memory
from services.runtime.process.process import publish, run, set_title
from services.runtime.rpc.access import credential_of
from services.runtime.rpc.live_settings import LiveSettings
from services.runtime.telemetry.load_report import LoadReport
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.request_log import RequestLog
from services.runtime.telemetry.supervisor import BACKGROUND

# A router that shares its port waits this long for a worker before it listens.
_FIRST_WORKER_SECONDS = 1.0


async def serve(settings: RouterSettings, stopping: asyncio.Event) -> None:
    tracer = settings.create_tracer()
    access, services = settings.access(), settings.service_tls()
    secret = settings.secret()
    mesh = settings.create_mesh(secret)
    hasher = RequestHasher(secret, lambda tenant: mesh.purges.epochs.tenant(tenant))
    has_workers = asyncio.Event()

    def set_ready(ready: bool) -> None:
        server.set_serving(ready and not stopping.is_set())
        if ready:
            has_workers.set()

    fleet = Fleet(
        settings.listings(),
        set_ready,
        clock=time.monotonic,
        sources=settings.create_sources(),
        region=settings.region,
        zone=settings.zone,
        open_channel=partial(GrpcChannel, tls=services, credential=credential_of(settings.key_secret)),
        isolates=access.is_closed,
    )
    requests = RequestMetrics()
    limits = ConcurrencyLimits(settings.queue_seconds, time.monotonic)
    dispatcher = Dispatcher(fleet, limits, RetryBudget(time.monotonic), TailLatency())
    quotas = Quotas(settings.quotas, time.monotonic)
    more_quotas = (settings.byte_quotas, settings.concurrency_quotas, settings.cache_quotas)
    tenant_limits = TenantLimits(*more_quotas, mesh.local, time.monotonic) if any(more_quotas) else None
    report = LoadReport(requests.answers, cores=cores.available())
    audit = Audit(dispatcher.run, settings.audit_share, time.monotonic)
    request_log = RequestLog(time.monotonic)
    prices = Prices(
        settings.cpu_second_price, settings.gpu_second_price, settings.memory_gb_hour_price, settings.currency
    )
    cost = CostMetrics(
        prices,
        requests,
        lambda model, version: fleet.view.catalog.find(model, version).provider,
        lambda: mesh.local.counters.bytes,
        time.monotonic,
    )
    targets = {"availability": settings.slo_availability, "latency": settings.slo_latency}
    slo = Slo(targets, settings.slo_latency_seconds, requests, time.monotonic)
    budgets = Budgets()
    meter = Meter(budgets, settings.usage_tenants) if settings.ledger_address is not None else None
    replies = Replies(mesh, tracer, requests, request_log, cost, audit, report, meter)
    path = RequestPath(
        fleet, mesh, hasher, dispatcher, tracer, requests, replies, quotas, audit, access, budgets, tenant_limits
    )
    inference = InferenceService(fleet, path)
    control = FleetControl(fleet, requests, audit, lambda: mesh.purges.announce(MODELS))
    more = {
        **control.handlers(),
        **LiveSettings(tracer, lambda model: fleet.view.catalog.find(model, "")).handlers(),
    }
    evictions = Evictions(mesh.local, lambda: _models(fleet, mesh))
    cache = CacheService(
        mesh, evictions, EntryFrames(secret), requests.usages, lambda: fleet.view.catalog.tenant_scoped
    )
    server = settings.create_server(
        [
            inference.service(lambda: server.health.serving, more),
            OperatorService(fleet, mesh, Keyer(fleet, mesh.purges, hasher, audit)).service(),
            cache.service(),
        ],
        access,
        share_port=settings.share_port,
    )
    metrics = Metrics()
    metrics.add(lambda: cache_samples(mesh, evictions))
    counted = (fleet, requests, dispatcher, quotas, audit, hasher, path, tracer, request_log, cost, slo)
    for part in (*counted, server.calls):
        metrics.add(part.samples)
    if tenant_limits is not None:
        metrics.add(tenant_limits.samples)
    if settings.triton_metrics:
        metrics.add(requests.triton_samples)
    usage = None
    if settings.ledger_address is not None and meter is not None:
        spool = LedgerSpool(settings.usage_dir, settings.usage_spool_bytes, time.time_ns)
        sender = LedgerSender(spool, settings.ledger_address, credential_of(settings.key_secret), services)
        usage = Usage(meter, budgets, sender, settings.region, lambda: _up(fleet))
        metrics.add(usage.samples)
        usage.start()
    mesh.purges.on_news = control.hear
    mesh.start()
    fleet.start()
    if settings.share_port:
        # Once this router listens, the kernel gives it connections that another router could serve.
        with suppress(TimeoutError):
            await asyncio.wait_for(has_workers.wait(), _FIRST_WORKER_SECONDS)
    set_title("router", settings.address, await server.start())
    exposition = await publish(settings, metrics, tracer.process)
    report.start(server.receiver_seconds)
    Agreement(fleet, time.monotonic).start()
    requests.start()
    slo.start()
    BACKGROUND.start("purged answers", PurgeSweep(mesh.local, mesh.purges, lambda: _digests(fleet)).keep_sweeping)
    BACKGROUND.start("huge pages", huge_pages.keep_collapsing)
    BACKGROUND.start("free memory", memory.keep_giving_back)
    await stopping.wait()
    fleet.events.close()
    cache.close()
    await server.stop(settings.drain_seconds)
    if usage is not None:
        await usage.close()
    exposition.close()
    fleet.close()
    await mesh.close()
    await tracer.close()


def _up(fleet: Fleet) -> Iterator[Up]:
    """The workers that are up. One that runs a model on a GPU is of that type."""
    for member in fleet.view.members.values():
        if member.healthy:
            types = {worker_type(model.provider) for model in member.models}
            yield Up(member.worker_id, max(types, default="cpu"), member.region)


def _models(fleet: Fleet, mesh: Mesh) -> dict[bytes, str]:
    """Maps key prefixes (the first half of a cache key) to model names."""
    epochs = mesh.purges.epochs
    return {epochs.prefix(digest, name): name for digest, name in _digests(fleet)}


def _digests(fleet: Fleet) -> list[tuple[bytes, str]]:
    """Returns the digest and the name of each model version."""
    catalog = fleet.view.catalog
    return [
        (catalog.find(name, version).digest, name)
        for name, versions in catalog.versions.items()
        for version in versions
    ]


def main() -> None:
    run(RouterSettings, serve)
