"""The router process: builds the fleet, the parts and the services, serves until stopped, then drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from cache.api.metrics import cache_samples
from cache.api.service import CacheService
from cache.keys.purge_sweep import PurgeSweep
from cache.tiers.entry import EntryFrames
from cache.tiers.evictions import Evictions
from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from router.accounting.usage import Up, Usage
from router.membership.fleet import Fleet
from router.operator.service import OperatorService
from router.request.keyer import Keyer
from router.request.service import InferenceService
from router.router import Router
from router.settings import RouterSettings
from router.transport.grpc_channel import GrpcChannel
from services.runtime.machine import huge_pages, memory
from services.runtime.process.process import publish, run, set_title
from services.runtime.rpc.access import credential_of
from services.runtime.rpc.live_settings import LiveSettings
from services.runtime.rpc.rpc import Service
from services.runtime.rpc.service_tls import ServiceTls
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.supervisor import BACKGROUND
from services.runtime.telemetry.tracing import Tracer

# A router that shares its port waits this long for a worker before it listens.
_FIRST_WORKER_SECONDS = 1.0


async def serve(settings: RouterSettings, stopping: asyncio.Event) -> None:
    tracer, access, tls = settings.create_tracer(), settings.access(), settings.service_tls()
    secret = settings.secret()
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
        open_channel=partial(GrpcChannel, tls=tls, credential=credential_of(settings.key_secret)),
        isolates=access.is_closed,
    )
    router = Router(settings, secret, fleet, tracer, access)
    evictions = Evictions(router.mesh.local, lambda: _models(router))
    cache = CacheService(
        router.mesh,
        evictions,
        EntryFrames(secret),
        router.accounts.requests.usages,
        lambda: fleet.view.catalog.tenant_scoped,
    )
    services = [*_services(router, tracer, lambda: server.health.serving), cache.service()]
    server = settings.create_server(services, access, share_port=settings.share_port)
    metrics = Metrics()
    metrics.add(lambda: cache_samples(router.mesh, evictions))
    for source in (router.samples, tracer.samples, server.calls.samples):
        metrics.add(source)
    if settings.triton_metrics:
        metrics.add(router.accounts.requests.triton_samples)
    usage = _usage(settings, router, tls)
    if usage is not None:
        metrics.add(usage.samples)
        usage.start()
    router.start()
    if settings.share_port:
        # Once this router listens, the kernel gives it connections that another router could serve.
        with suppress(TimeoutError):
            await asyncio.wait_for(has_workers.wait(), _FIRST_WORKER_SECONDS)
    set_title("router", settings.address, await server.start())
    exposition = await publish(settings, metrics, tracer.process)
    router.accounts.load.start()
    _start_upkeep(router)
    await stopping.wait()
    fleet.events.close()
    cache.close()
    await server.stop(settings.drain_seconds)
    if usage is not None:
        await usage.close()
    exposition.close()
    fleet.close()
    await router.mesh.close()
    await tracer.close()


def _services(router: Router, tracer: Tracer, is_ready: Callable[[], bool]) -> list[Service]:
    fleet = router.fleet
    live = LiveSettings(tracer, lambda model: fleet.view.catalog.find(model, ""))
    keyer = Keyer(fleet, router.mesh.purges, router.hasher, router.audit)
    return [
        InferenceService(fleet, router.path).service(is_ready, {**router.control.handlers(), **live.handlers()}),
        OperatorService(fleet, router.mesh, keyer).service(),
    ]


def _usage(settings: RouterSettings, router: Router, tls: ServiceTls | None) -> Usage | None:
    """What sends the usage to the ledger; None if there is none."""
    accounts = router.accounts
    if settings.ledger_address is None or accounts.meter is None:
        return None
    spool = LedgerSpool(settings.usage_dir, settings.usage_spool_bytes, time.time_ns)
    sender = LedgerSender(spool, settings.ledger_address, credential_of(settings.key_secret), tls)
    return Usage(accounts.meter, accounts.budgets, sender, settings.region, lambda: _up(router.fleet))


def _start_upkeep(router: Router) -> None:
    router.slo.start()
    sweep = PurgeSweep(router.mesh.local, router.mesh.purges, lambda: _digests(router.fleet))
    BACKGROUND.start("purged answers", sweep.keep_sweeping)
    BACKGROUND.start("huge pages", huge_pages.keep_collapsing)
    BACKGROUND.start("free memory", memory.keep_giving_back)


def _up(fleet: Fleet) -> Iterator[Up]:
    """The workers that are up."""
    for member in fleet.view.members.values():
        if member.healthy:
            yield Up(member.worker_id, member.worker_type, member.region)


def _models(router: Router) -> dict[bytes, str]:
    """Maps key prefixes (the first half of a cache key) to model names."""
    epochs = router.mesh.purges.epochs
    return {epochs.prefix(digest, name): name for digest, name in _digests(router.fleet)}


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
