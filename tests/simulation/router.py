"""A router as a simulated process, wired as in router/main.py, without the engine and parts that only observe."""

import asyncio
import logging
import time
from functools import partial

from cache.keys.epochs import MODELS
from cache.keys.keys import RequestHasher
from cache.tiers.evictions import Evictions
from router.accounting.budgets import Budgets
from router.accounting.cost import CostMetrics, Prices
from router.accounting.request_metrics import RequestMetrics
from router.admission.concurrency_limit import ConcurrencyLimits
from router.admission.quotas import Quotas
from router.balancing.member import Listing
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.membership.discovery import AnnouncedWorkers
from router.membership.fleet import Fleet
from router.operator.agreement import Agreement
from router.operator.control import FleetControl
from router.request.audit import Audit
from router.request.path import RequestPath
from router.request.replies import Replies
from router.settings import RouterSettings
from services.runtime import faults
from services.runtime.driver import Driver
from services.runtime.redis import discovery
from services.runtime.rpc.access import Access
from services.runtime.rpc.rpc import failure
from services.runtime.telemetry.load_report import LoadReport
from services.runtime.telemetry.request_log import RequestLog
from services.runtime.telemetry.spans import Process as TracedProcess
from services.runtime.telemetry.tracing import Tracer
from tests.simulation.loop import Process
from tests.simulation.network import SimChannel
from tests.simulation.redis import REDIS_URL

log = logging.getLogger(__name__)


async def _list_all(addresses, report):
    """A source that lists all workers; as with any source, the ring is built off the event loop."""
    report([Listing(address) for address in addresses])
    await asyncio.Event().wait()


class SimRouter:
    """The router `name`; each start is a new process."""

    def __init__(self, world, number, **settings):
        self.world = world
        self.name = f"router-{number}"
        self._settings = {"address": f"10.0.1.{number + 1}:8001", "key_secret": "simulation", **settings}
        # Probability that the clock of its quotas raises.
        self.clock_fails = 0.0
        self.process = None
        self.fleet = self.mesh = None
        self.starts = 0

    def start(self):
        """Starts a new process, with empty memory."""
        self.starts += 1
        self.fleet = self.mesh = None
        self.process = Process(self.world.loop, self.name)
        self.process.call(self._serve)

    def kill(self):
        """Kills the process; all requests in flight are lost."""
        self.world.trace("kill", self.name)
        self.process.kill()

    def _serve(self):
        world = self.world
        settings = RouterSettings.model_construct(**self._settings)
        secret = settings.secret()
        self.mesh = mesh = settings.create_mesh(secret)
        hasher = RequestHasher(secret, lambda tenant: mesh.purges.epochs.tenant(tenant))
        addresses = [worker.address for worker in world.workers]
        source = (
            AnnouncedWorkers(discovery.connect(REDIS_URL)).watch if world.announced else partial(_list_all, addresses)
        )
        self.fleet = fleet = Fleet(
            [],
            lambda _: None,
            clock=time.monotonic,
            sources={"simulation": source},
            open_channel=partial(SimChannel, world.network, self.process),
        )
        self.requests = requests = RequestMetrics()
        self.limits = ConcurrencyLimits(settings.queue_seconds, time.monotonic)
        self.dispatcher = Dispatcher(fleet, self.limits, RetryBudget(time.monotonic), TailLatency())
        self.quotas = Quotas(settings.quotas or {"*": 1e6}, self._clock)
        report = LoadReport(requests.answers, cores=1)
        audit = Audit(self.dispatcher.run, settings.audit_share, time.monotonic)
        tracer = Tracer(TracedProcess("router", self.name), settings.trace_ratio, [])
        cost = CostMetrics(
            Prices(0.0, 0.0),
            requests,
            lambda model, version: fleet.view.catalog.find(model, version).provider,
            lambda: mesh.local.counters.bytes,
            time.monotonic,
        )
        replies = Replies(mesh, tracer, requests, RequestLog(time.monotonic), cost, audit, report, None)
        self.path = RequestPath(
            fleet, mesh, hasher, self.dispatcher, tracer, requests, replies, self.quotas, audit, Access(""), Budgets()
        )
        control = FleetControl(fleet, requests, audit, lambda: mesh.purges.announce(MODELS))
        self.handlers = control.handlers()
        self.evictions = Evictions(mesh.local)
        mesh.purges.on_news = control.hear
        mesh.start()
        fleet.start()
        Agreement(fleet, time.monotonic).start()
        requests.start()

    def _clock(self):
        if self.clock_fails and self.world.random.random() < self.clock_fails:
            raise ArithmeticError("a clock that fails")
        return time.monotonic()

    def receive(self, call):
        """Handles a call as FastPathServer does; `call.answered_by_router` gets the answer."""
        call.cancel_at_router = None
        deadline = None if call.timeout is None else time.monotonic() + call.timeout
        try:
            coroutine = self.path.infer(call.data, call.metadata, deadline)
            coroutine.send(None)
        except StopIteration as end:
            self._end(call, end.value)
        except Exception as error:
            self._end(call, failure(faults.reported(log, "a fast path failed", error)))
        else:
            driver = Driver(coroutine, lambda outcome: self._end(call, outcome))
            call.cancel_at_router = driver.cancel
            driver.start(deadline)

    def _end(self, call, answer):
        call.cancel_at_router = None
        if isinstance(answer, asyncio.CancelledError):
            return
        if isinstance(answer, Exception):
            answer = failure(faults.reported(log, "a fast path failed", answer))
        call.answered_by_router(answer)
        if answer.afterwards is not None:
            try:
                answer.afterwards()
            except Exception as error:
                self.world.crashed(f"what an answer left to be done failed: {error!r}")

    def cancel(self, call):
        """Cancels a call whose caller has left."""
        cancel, call.cancel_at_router = call.cancel_at_router, None
        if cancel is not None:
            cancel()
