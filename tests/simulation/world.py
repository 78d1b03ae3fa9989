"""A fleet, its callers and what goes wrong, all by one seed; and what must hold whatever happens."""

import gc
import hashlib
import logging
import random
import time

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import EVERYTHING, model_scope, tenant_scope
from services.runtime import faults
from services.runtime.errors import RingmeshError
from services.runtime.redis import redis_client
from services.runtime.telemetry.supervisor import BACKGROUND
from tests.simulation.calls import EPSILON_NS, Call
from tests.simulation.clock import clock
from tests.simulation.loop import NOBODY, SimLoop
from tests.simulation.model import QUEUE_SECONDS, Repository
from tests.simulation.network import AbortError, Context, Network
from tests.simulation.redis import Redis
from tests.simulation.router import SimRouter
from tests.simulation.runs import Runs
from tests.simulation.worker import SimWorker

# Nothing may hold an event loop for longer.
HELD_NS = 50_000_000
# A caller without a deadline is answered within this, once everything that was broken works again.
PATIENCE_NS = 60_000_000_000
_SECOND = 1_000_000_000


class World:
    """What a seed makes. `plan` (plans.py) says what happens in it."""

    def __init__(self, seed, plan_name="", show=None):
        self.seed = seed
        self.random = random.Random(seed)
        random.seed(seed)
        clock.reset()
        # There is one for a process, and both remember what they have logged.
        BACKGROUND.__init__()
        faults._kinds.clear()
        self._show = show
        self._hash = hashlib.blake2b(digest_size=8)
        self.events = 0
        self.violations = []
        self.loop = SimLoop(self._held)
        self.network = Network(self.loop, self.random, self.trace)
        self.runs = Runs(self)
        self.redis = None
        self.announced = False
        self.workers, self.routers = [], []
        self.repository = None
        self.calls = []
        # By router and scope: (when a purge began, when it was acknowledged), of all that were.
        self.purged = {}
        # By router and model: (when its switch was acknowledged, the variant).
        self.switched = {}
        self.switching = {}
        # Faults that may make a right request fail, and lies that may make anything fail.
        self.faulty = self.lied = False
        # Redis answers nonsense, of which the log may tell.
        self.tampered = False
        # What nobody foresaw is raised: its request ends with INTERNAL.
        self.raising = False
        # Equal requests are never run at once, for nothing but their owner is ever asked.
        self.light = False
        # A request is answered within so long.
        self.slowest_ns = 0
        self.quotas = False
        self.first_of_tenant = {}
        self.uncoordinated = set()
        self._log = _Log(self)

    # What is seen.

    def trace(self, what, *details):
        """An event; the hash of all of them says whether two runs were the same."""
        self.events += 1
        line = f"{clock.ns() - 1_000_000_000_000:>14,} {what} {' '.join(map(str, details))}"
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line)

    @property
    def digest(self):
        """Of all that happened."""
        return self._hash.hexdigest()

    def violated(self, what):
        """Something that must never be."""
        self.trace("VIOLATION", what)
        self.violations.append(f"{(clock.ns() - 1_000_000_000_000) / 1e9:.6f} s: {what}")

    def crashed(self, what):
        """An exception that nobody foresaw."""
        if self.lied or self.tampered or self.raising:
            self.trace("crash", what)
        else:
            self.violated(what)

    def _held(self, process, took_ns):
        if took_ns > HELD_NS:
            self.violated(f"the event loop of {process.name} was held for {took_ns / 1e6:.0f} ms")

    # What fleets are made of.

    def build(
        self, *, kinds, workers, routers, redis=False, announced=False, local=False, weights=None, threads=2, **settings
    ):
        """The processes, started at once."""
        self.repository = Repository(kinds)
        if redis:
            self.redis = Redis(self.loop, self.random, self.trace)
            redis_client.one_server = self.redis.client
            settings["redis_url"] = "redis://redis:6379"
        self.announced = announced
        for number in range(workers):
            weight = weights[number] if weights else 1.0
            self.workers.append(SimWorker(self, number, weight=weight, threads=threads, local=local))
        for number in range(routers):
            self.routers.append(SimRouter(self, number, audit_share=0.0, **settings))
        self.trace("build", kinds, workers, routers, redis, announced, local, sorted(settings))
        for worker in self.workers:
            worker.start()
        # What a router does not find it asks again half a second later.
        self.play(0.0 if self.random.random() < 0.1 else 0.01)
        for router in self.routers:
            router.start()

    def at(self, seconds, function, *args):
        """From now."""
        self.loop.call_at_ns(clock.now_ns + int(seconds * 1e9), function, *args, context=NOBODY)

    def call(self, router, kind, rows, **more):
        """A request from now on."""
        made = Call(self, len(self.calls), router, kind, rows, **more)
        self.calls.append(made)
        if more.get("tenant"):
            for row in made.rows:
                self.first_of_tenant.setdefault((more["tenant"], kind, float(row[0])), clock.now_ns)
        if more.get("control"):
            self.uncoordinated.update((kind, float(row[0])) for row in made.rows)
        made.send()
        return made

    def purge(self, router, scope_kind, value=""):
        """As an operator: acknowledged, nothing of before may be seen."""
        scope = {"all": EVERYTHING, "model": model_scope(value), "tenant": tenant_scope(value)}[scope_kind]
        if router.fleet is None or not router.process.alive:
            return
        began = clock.now_ns

        async def purge():
            try:
                await router.mesh.purges.purge([scope])
            except RingmeshError as error:
                self.trace("not purged", scope, error.message)
                if not self.faulty:
                    self.violated(f"a purge of {scope} failed: {error.message}")
                return
            self.trace("purged", scope, began)
            if self.redis is not None and clock.ns() - self.redis.emptied_ns < 3 * _SECOND:
                # It has lost who is there, and who was cut off at that moment is missed: docs/decisions/0026.
                return
            # Without Redis it reaches no other router.
            for hears in [router] if self.redis is None else self.routers:
                self.purged.setdefault((hears, scope_kind, value), []).append((began, clock.ns()))

        self.trace("purge", router.name, scope)
        router.process.spawn(purge())

    def switch(self, router, kind):
        """New files for a model, and a load of it through a router."""
        variant = (self.repository.variants[kind] + 1) % 3
        if variant == 0 or router.fleet is None or not router.process.alive or kind in self.switching:
            return
        self.repository.variants[kind] = variant
        self.switching[kind] = variant

        async def load():
            request = v2.RepositoryModelLoadRequest(model_name=kind).SerializeToString()
            try:
                await router.handlers["RepositoryModelLoad"].unary_unary(request, Context())
            except AbortError as error:
                self.trace("not loaded", kind, error.message)
                if not self.faulty:
                    self.violated(f"a load of {kind} failed: {error.message}")
            else:
                self.trace("loaded", kind, variant)
                if all(self._holds(worker, kind, variant) for worker in self.workers):
                    # Where Redis fails, other routers learn of it by their polls.
                    told = self.redis is not None and not self.redis.harmed
                    for hears in self.routers if told else [router]:
                        self.switched[hears, kind] = (clock.ns(), variant)
            del self.switching[kind]

        self.trace("switch", router.name, kind, variant)
        router.process.spawn(load())

    def _holds(self, worker, kind, variant):
        return worker.is_up and [held.model.variant for held in worker.store.held.of(kind)] == [variant]

    # What must hold.

    def left(self, call):
        """The caller gave up by itself; where that is because its time was up, it should have been told before."""
        router = call.router.process
        if call.timeout is not None and call.received_ns and router.runs and not router.frozen:
            late_ns = clock.now_ns - call.received_ns - int(call.timeout * 1e9)
            if late_ns > EPSILON_NS:
                self.violated(f"{call} had no answer {late_ns / 1e6:.1f} ms after its deadline")

    def judge(self, call):
        """An answer."""
        took_ns = call.ended_ns - call.received_ns
        if call.timeout is not None and not call.router.process.frozen:
            late_ns = took_ns - int(call.timeout * 1e9)
            if late_ns > EPSILON_NS:
                self.violated(f"{call} was answered {late_ns / 1e6:.1f} ms after its deadline")
        if self.slowest_ns and took_ns > self.slowest_ns + int(call.rows[:, 1].sum() * 1e9):
            self.violated(f"{call} took {took_ns / 1e9:.3f} s: {call.code} {call.message}")
        if call.code == "OK":
            self._judge_answer(call)
        else:
            self._judge_failure(call)
        for router in self.routers:
            if router.fleet is not None and router.mesh.local.counters.bytes > router.mesh.local.capacity:
                self.violated(f"the local tier of {router.name} holds more than it may")

    def _judge_answer(self, call):
        if call.invalid:
            self.violated(f"{call} is wrong ({call.invalid}), and was answered")
            return
        if call.variant < 0:
            if not self.lied:
                self.violated(f"{call} has an answer that is not the model's ({call.outcome})")
            return
        sent_ns = call.sent_ns
        at, variant = self.switched.get((call.router, call.kind), (0, 0))
        if at and sent_ns > at and call.variant < variant:
            self.violated(f"{call} was answered by a model that had been replaced ({call.outcome})")
        oldest = int(call.at_ns.min())
        scopes = [("all", ""), ("model", call.kind)]
        if call.kind == "scoped":
            scopes.append(("tenant", call.tenant))
        for scope in scopes:
            if any(oldest < began and ended < sent_ns for began, ended in self.purged.get((call.router, *scope), ())):
                self.violated(f"{call} was answered with what was purged ({scope}, {call.outcome})")
        if call.kind == "scoped" and call.tenant:
            for row, at_ns in zip(call.rows, call.at_ns, strict=True):
                if at_ns < self.first_of_tenant[call.tenant, call.kind, float(row[0])]:
                    self.violated(f"{call} was answered with what was computed for another tenant ({call.outcome})")
        if call.control == "no-cache" and oldest < sent_ns:
            self.violated(f"{call} with no-cache was answered from a cache ({call.outcome})")

    def _judge_failure(self, call):
        allowed = set()
        if call.invalid:
            allowed.add(call.invalid)
        if call.timeout is not None and call.ended_ns - call.received_ns >= int(call.timeout * 1e9) - EPSILON_NS:
            allowed.add("DEADLINE_EXCEEDED")
        if call.control == "only-if-cached":
            allowed.add("FAILED_PRECONDITION")
        if call.kind == "queued":
            allowed |= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
        if self.quotas:
            allowed.add("RESOURCE_EXHAUSTED")
        if self.faulty:
            allowed |= {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        if self.raising:
            allowed.add("INTERNAL")
        if self.lied:
            allowed |= {"INTERNAL", "NOT_FOUND", "FAILED_PRECONDITION", "UNKNOWN", "INVALID_ARGUMENT"}
        if call.code not in allowed:
            self.violated(f"{call} ended with {call.code}: {call.message}")

    def watch_queues(self, until_ns):
        """What has waited too long in a queue leaves it when its time is up, and not when somebody looks."""
        for worker in self.workers:
            for held in worker.store.held if worker.is_up else ():
                if held.model.name != "queued":
                    continue
                for waiting in held.batcher._queue:
                    late_ns = time.time_ns() - waiting.queued_ns - int(QUEUE_SECONDS * 1e9)
                    if late_ns > HELD_NS and not waiting.future.done():
                        self.violated(
                            f"a request is {late_ns / 1e6:.0f} ms over its time in a queue of {worker.worker_id}"
                        )
        if clock.now_ns < until_ns:
            self.at(0.02, self.watch_queues, until_ns)

    def overlapped(self, model, row, one, other):
        """Equal work began while it was under way."""
        name = (model.name, float(row[0]))
        # Rows of batches have no worker of their own, and tenants do not share what they ask for.
        apart = not model.cacheable or model.row_cache or model.tenant_scoped
        if not self.light or self.faulty or apart or name in self.uncoordinated:
            return
        self.violated(f"{name} runs on {one} and on {other} at once")

    # The course of it.

    def run(self, plan):
        """All of it."""
        self._log.begin()
        gc.disable()
        try:
            plan(self)
            self._settle()
        finally:
            self._log.end()
            gc.enable()
            self.loop.abandon()
        return self

    def play(self, seconds):
        """Goes on for so long."""
        self.loop.run(clock.now_ns + int(seconds * 1e9))

    def until_ready(self):
        """All routers know all workers, and what they hold."""
        self.loop.run(clock.now_ns + 5 * _SECOND, self.is_ready)
        if not self.is_ready():
            died = [task.exception() for task in self.loop.tasks if task.done() and not task.cancelled()]
            raise AssertionError(f"the fleet does not become ready: {self.loop.errors} {[e for e in died if e]}")

    def is_ready(self):
        """Whether every router would ask every worker for every model."""
        for router in self.routers:
            if router.fleet is None:
                return False
            members = router.fleet.view.members
            if len(members) < len(self.workers) or not all(member.healthy for member in members.values()):
                return False
        return True

    def _settle(self):
        """Everything works again, and everyone has an answer: what must be so then."""
        limit = clock.now_ns + PATIENCE_NS
        self.loop.run(limit, lambda: not any(call.is_open for call in self.calls))
        for call in self.calls:
            if call.is_open:
                self.violated(f"{call} was never answered")
        self.lied = self.tampered = self.raising = False
        self.play(1.0)
        self._recover()
        self.play(1.2)
        self._at_rest()

    def _recover(self):
        """A fleet that was in trouble serves as before."""
        if not self.faulty:
            return
        self.loop.run(clock.now_ns + 15 * _SECOND, self.is_ready)
        if not self.is_ready():
            unhealthy = [
                f"{router.name}: {member.worker_id} {member.reason}"
                for router in self.routers
                if router.fleet is not None
                for member in router.fleet.view.members.values()
                if not member.healthy
            ]
            self.violated(f"the fleet does not recover: {unhealthy}")
        self.faulty = False
        self.slowest_ns = 0
        probes = [
            self.call(router, kind, [[90_000 + 100 * index + place, 0, 0, 0]])
            for index, router in enumerate(self.routers)
            for place, kind in enumerate(self.repository.variants)
        ]
        self.loop.run(clock.now_ns + 10 * _SECOND, lambda: not any(probe.is_open for probe in probes))
        for probe in probes:
            if probe.is_open:
                self.violated(f"{probe} was never answered, after all faults")

    def _at_rest(self):
        """Nothing is left of what was under way."""
        left = {}
        for router in self.routers:
            mesh = router.mesh
            left[f"{router.name} requests"] = router.requests.in_flight
            left[f"{router.name} flights"] = len(mesh.flights._flights)
            left[f"{router.name} leaders"] = len(mesh._leaders)
            left[f"{router.name} sequences"] = len(router.path._sequences)
            left[f"{router.name} limits"] = sum(limit.in_flight for limit in router.limits._limits.values())
            for member in router.fleet.view.members.values():
                left[f"{router.name}>{member.worker_id} outstanding"] = member.load.in_flight
                left[f"{router.name}>{member.worker_id} under way"] = member.link._under_way
                left[f"{router.name}>{member.worker_id} envelopes"] = len(member.link._envelopes)
        for worker in self.workers:
            if worker.is_up:
                left[f"{worker.worker_id} requests"] = worker.worker.load.requests
                left[f"{worker.worker_id} flights"] = len(worker.worker._flights._flights)
                left[f"{worker.worker_id} plain"] = len(worker.worker._plain)
                for held in worker.store.held:
                    left[f"{worker.worker_id} {held.model.name} waiting"] = held.waiting
        for what, count in left.items():
            if count:
                self.violated(f"at rest: {what} is {count}")
        for task in self.loop.tasks:
            if task.done() and not task.cancelled() and task._log_traceback:
                self.violated(f"a task died without a word: {task.get_coro().__qualname__}: {task.exception()!r}")
        for error in self.loop.errors:
            self.violated(f"asyncio: {error}")
        for poison, killed in self.runs.killed.items():
            if killed > 2:
                self.violated(f"request {poison:g} killed {killed} workers")


class _Log(logging.Handler):
    """Errors in the log are what nobody foresaw."""

    def __init__(self, world):
        super().__init__(logging.ERROR)
        self._world = world

    def begin(self):
        logging.getLogger().addHandler(self)
        logging.getLogger().setLevel(logging.ERROR)

    def end(self):
        logging.getLogger().removeHandler(self)

    def emit(self, record):
        error = record.exc_info[1] if record.exc_info else None
        self._world.crashed(f"logged: {record.getMessage()}: {error!r}")
