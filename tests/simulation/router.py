"""A router as a simulated process, without the engine and what only router/main.py starts."""

import asyncio
import logging
import time
from functools import partial

from router.balancing.member import Listing
from router.membership.discovery import AnnouncedWorkers
from router.membership.fleet import Fleet
from router.router import Router
from router.settings import RouterSettings
from services.runtime import faults
from services.runtime.driver import Driver
from services.runtime.redis import discovery
from services.runtime.rpc.access import Access
from services.runtime.rpc.rpc import failure
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
        self._settings["quotas"] = settings.get("quotas") or {"*": 1e6}
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
        tracer = Tracer(TracedProcess("router", self.name), settings.trace_ratio, [])
        router = Router(settings, settings.secret(), fleet, tracer, Access(""), self._clock)
        self.mesh, self.path, self.limits = router.mesh, router.path, router.limits
        self.requests, self.handlers = router.accounts.requests, router.control.handlers()
        router.start()

    def _clock(self):
        if self.clock_fails and self.world.random.random() < self.clock_fails:
            raise ArithmeticError("a clock that fails")
        return time.monotonic()

    def receive(self, call):
        """Handles a call as NativeServer does; `call.answered_by_router` gets the answer."""
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
