"""A router without what serves it: its process adds an engine and services, the simulation does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from cache.keys.epochs import MODELS
from cache.keys.keys import RequestHasher
from router.accounting.accounts import Accounts
from router.accounting.cost import Prices
from router.accounting.slo import Slo
from router.admission.concurrency_limit import ConcurrencyLimits
from router.admission.quotas import Quotas
from router.admission.tenant_limits import TenantLimits
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.membership.fleet import Fleet
from router.operator.agreement import Agreement
from router.operator.control import FleetControl
from router.request.audit import Audit
from router.request.path import RequestPath
from router.request.replies import Replies
from router.settings import RouterSettings
from services.runtime.machine import cores
from services.runtime.rpc.access import Access
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.tracing import Tracer


class Router:
    """The parts of a router, connected with each other: for the router process and for simulated routers."""

    def __init__(
        self,
        settings: RouterSettings,
        secret: str,
        fleet: Fleet,
        tracer: Tracer,
        access: Access,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secret`: that of `settings`. `clock`: of the quotas. Raises StartError."""
        self.fleet = fleet
        self.mesh = mesh = settings.create_mesh(secret)
        self.hasher = RequestHasher(secret, lambda tenant: mesh.purges.epochs.tenant(tenant))
        self.accounts = Accounts.create(
            Prices(
                settings.cpu_second_price, settings.gpu_second_price, settings.memory_gb_hour_price, settings.currency
            ),
            lambda model, version: fleet.view.catalog.find(model, version).provider,
            lambda: mesh.local.counters.bytes,
            cores.available(),
            settings.usage_tenants if settings.ledger_address is not None else None,
        )
        targets = {"availability": settings.slo_availability, "latency": settings.slo_latency}
        self.slo = Slo(targets, settings.slo_latency_seconds, self.accounts.requests, time.monotonic)
        self.limits = ConcurrencyLimits(settings.queue_seconds, time.monotonic)
        self.dispatcher = Dispatcher(fleet, self.limits, RetryBudget(time.monotonic), TailLatency())
        self.quotas = Quotas(settings.quotas, clock)
        of_tenants = (settings.byte_quotas, settings.concurrency_quotas, settings.cache_quotas)
        self.tenant_limits = TenantLimits(*of_tenants, mesh.local, clock) if any(of_tenants) else None
        self.audit = Audit(self.dispatcher.run, settings.audit_share, time.monotonic)
        self.path = RequestPath(
            fleet,
            mesh,
            self.hasher,
            self.dispatcher,
            tracer,
            self.accounts,
            Replies(mesh, tracer, self.accounts, self.audit),
            self.quotas,
            self.audit,
            access,
            self.tenant_limits,
        )
        self.control = FleetControl(fleet, self.accounts.requests, self.audit, lambda: mesh.purges.announce(MODELS))

    def start(self) -> None:
        """Starts the background work of the parts."""
        self.mesh.purges.on_news = self.control.hear
        self.mesh.start()
        self.fleet.start()
        Agreement(self.fleet, time.monotonic).start()
        self.accounts.requests.start()

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        parts = (self.fleet, self.accounts, self.slo, self.dispatcher, self.quotas, self.audit, self.hasher, self.path)
        for part in parts:
            yield from part.samples()
        if self.tenant_limits is not None:
            yield from self.tenant_limits.samples()
