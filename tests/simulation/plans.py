"""Plans of a simulation: each has one kind of fault, or none, and the seed decides how much of it."""

from tests.simulation.clock import clock
from tests.simulation.worker import Liar

_TENANTS = ("acme", "globex", "")
_COORDINATED = ("plain", "scoped", "uncached", "rows", "fresh")


def choose(world):
    """Chooses the plan of a seed."""
    names = list(PLANS)
    return world.random.choices(names, [PLANS[name][1] for name in names])[0]


def _kinds(world, count, among=_COORDINATED):
    return world.random.sample(among, min(count, len(among)))


def _fleet(world, *, kinds, workers=None, routers=None, redis=None, **more):
    random = world.random
    redis = random.random() < 0.6 if redis is None else redis
    workers = workers or random.choice((1, 2, 2, 3))
    more.setdefault("announced", redis and random.random() < 0.2)
    more.setdefault("local", random.random() < 0.5)
    world.build(kinds=kinds, workers=workers, routers=routers or random.choice((1, 1, 2)), redis=redis, **more)
    world.until_ready()


def _traffic(
    world, count, span, *, seconds=(0.0, 0.0), timeouts=0.1, cancels=0.05, wrong=0.05, controls=0.1, pool=None
):
    """Schedules `count` requests over `span` seconds, for keys from a small pool."""
    random = world.random
    pool = pool or max(2, count // 4)
    kinds = list(world.repository.variants)
    durations = {}
    for _ in range(count):
        kind = random.choice(kinds)
        number = int(pool * random.random() ** 2)
        key = (kind, number)
        if key not in durations:
            durations[key] = random.choice((0.0, 0.0, random.uniform(*seconds)))
        rows = [[number, durations[key], 0, 0]]
        if kind == "rows":
            rows += [[random.randrange(pool), 0, 0, 0] for _ in range(random.choice((0, 1, 3)))]
        more = {}
        if kind == "scoped" or random.random() < 0.1:
            more["tenant"] = random.choice(_TENANTS)
        if random.random() < timeouts:
            more["timeout"] = random.choice((0.002, 0.02, 0.2, 1.0))
        if random.random() < controls:
            more["control"] = random.choice(("no-cache", "no-store", "max-age=1", "only-if-cached"))
        if random.random() < wrong:
            more["invalid"] = random.choice(("NOT_FOUND", "INVALID_ARGUMENT"))
            more.pop("control", None)
        leaves = random.uniform(0, 0.02) if random.random() < cancels else None
        world.at(random.uniform(0, span), _call, world, random.choice(world.routers), kind, rows, more, leaves)


def _call(world, router, kind, rows, more, leaves):
    made = world.call(router, kind, rows, **more)
    if leaves is not None:
        world.at(leaves, made.leave)


def _send(world, at, kind, number, seconds=0, poison=0):
    """Schedules one request at the first router, `at` seconds from now."""
    world.at(at, world.call, world.routers[0], kind, [[number, seconds, poison, 0]])


def _operate(world, span):
    """Schedules some purges and new models."""
    random = world.random
    for _ in range(random.choice((0, 1, 2))):
        kind, value = random.choice(
            (("all", ""), ("model", random.choice(list(world.repository.variants))), ("tenant", "acme"))
        )
        world.at(random.uniform(0, span), world.purge, random.choice(world.routers), kind, value)
    for _ in range(random.choice((0, 0, 1, 2))):
        kind = random.choice(list(world.repository.variants))
        world.at(random.uniform(0, span), world.switch, random.choice(world.routers), kind)


def calm(world):
    """No faults and little load: equal work must run once."""
    random = world.random
    _fleet(world, kinds=_kinds(world, random.choice((1, 2, 3))))
    world.light = True
    count = random.choice((20, 40, 60))
    _traffic(world, count, count * 0.02, seconds=(0, 0.01), wrong=0.1)
    world.play(count * 0.02)


def busy(world):
    """No faults and high load."""
    random = world.random
    _fleet(world, kinds=_kinds(world, random.choice((1, 2, 3))))
    count = random.choice((40, 80, 160))
    span = count * 0.002
    _traffic(world, count, span, seconds=(0, 0.003))
    _operate(world, span)
    world.play(span)


def slow_request(world):
    """No faults, but one request takes far longer than earlier requests of the same shape."""
    random = world.random
    kind = random.choice(("loop", "plain"))
    _fleet(world, kinds=[kind], workers=2, routers=1)
    for number in range(50):
        _send(world, number * 0.004, kind, number)
    slow = random.uniform(1, 6) if kind == "loop" else random.uniform(0.01, 0.04)
    _send(world, 0.25, kind, 1000, slow)
    for number in range(20):
        _send(world, 0.3 + number * 0.01, kind, 2000 + number)
    world.play(1)


def queue(world):
    """A model whose queue has a short timeout and a small size."""
    random = world.random
    _fleet(world, kinds=["queued"], workers=random.choice((1, 2)), routers=1)
    for number in range(random.choice((10, 30))):
        seconds = random.choice((0.0, 0.05, 0.3, 1.0))
        _send(world, random.uniform(0, 0.5), "queued", number, seconds)
    world.watch_queues(clock.now_ns + 2_000_000_000)
    world.play(2)


def tight(world):
    """Caches and quotas are small."""
    random = world.random
    redis = random.random() < 0.5
    quotas = {"acme": 50.0, "*": 20.0} if random.random() < 0.3 else {}
    world.quotas = bool(quotas)
    _fleet(
        world,
        kinds=_kinds(world, 2),
        redis=redis,
        local_tier_bytes=random.choice((0, 9_000, 20_000, 60_000)),
        quotas=quotas,
        shared_admission=redis and random.random() < 0.3,
        refusal_seconds=random.choice((0.0, 1.0)),
    )
    if world.redis is not None:
        world.redis.limit, world.redis.evicts = random.choice((1_000, 10_000)), random.random() < 0.5
    count = random.choice((60, 120, 240))
    _traffic(world, count, 0.5, pool=count, wrong=0.02)
    world.play(0.5)


def stopped_worker(world):
    """One of several workers is stopped for a while, as by SIGSTOP: the others must answer all requests soon."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2, ("plain", "scoped", "uncached")), workers=random.choice((2, 3)), threads=1)
    world.faulty = True
    count = random.choice((40, 80, 150))
    _traffic(world, count, 0.6, seconds=(0, 0.002), timeouts=0, cancels=0, wrong=0, controls=0, pool=4 * count)
    # Half a second of silence, then two pings of half a second each, detect the stopped worker.
    world.slowest_ns = 2_200_000_000
    worker = random.choice(world.workers)
    world.at(random.uniform(0, 0.5), _stop, world, worker)
    world.play(6)
    worker.process.go_on()


def _stop(world, worker):
    world.trace("stop", worker.worker_id)
    worker.process.stop()


def dying_workers(world):
    """Workers are killed and restarted."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2), workers=random.choice((2, 3)))
    world.faulty = True
    count = random.choice((40, 80))
    _traffic(world, count, 1.5, seconds=(0, 0.02))
    for _ in range(random.choice((1, 2, 4))):
        worker, at = random.choice(world.workers), random.uniform(0, 1.2)
        world.at(at, worker.kill, "fault")
        world.at(at + random.uniform(0.05, 0.8), _restart, worker)
    world.play(2.1)


def _restart(worker):
    if not worker.process.alive:
        worker.start()


def network(world):
    """Paths between routers and workers are cut, dark or slow."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2), workers=random.choice((2, 3)), local=False)
    world.faulty = True
    _traffic(world, random.choice((40, 80)), 1.5, seconds=(0, 0.02))
    for _ in range(random.choice((1, 2, 4))):
        way = world.network.way(random.choice(world.routers).name, random.choice(world.workers).address)
        at, lasts = random.uniform(0, 1.2), random.choice((0.1, 0.8, 3.0))
        what = random.choice(("cut", "dark", "slow"))
        world.at(at, _harm, world, way, what)
        world.at(at + lasts, _heal, world, way)
    world.play(4.5)


def _harm(world, way, what):
    world.trace(what, way.name)
    if what == "cut":
        way.cut()
    elif what == "dark":
        way.dark = True
    else:
        way.slow = 100.0


def _heal(world, way):
    world.trace("heal", way.name)
    way.slow = 1.0
    way.light()


def lies(world):
    """A worker gives wrong answers for a while."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2), workers=random.choice((2, 3)), local=False)
    world.faulty = world.lied = True
    worker = random.choice(world.workers)
    worker.lie = Liar(random, random.choice((0.2, 1.0)))
    world.trace("lie", worker.worker_id, worker.lie)
    if random.random() < 0.5:
        # It reports its models once, when it starts.
        worker.kill("fault")
        worker.start()
    _traffic(world, random.choice((30, 60)), 1.0, seconds=(0, 0.01))
    world.play(2.5)
    worker.lie = None
    worker.kill("fault")
    worker.start()
    world.play(0.6)
    world.purge(world.routers[0], "all")


def redis_faults(world):
    """Redis is down, hangs, is slow, loses or damages data, is full, restarts, or is cut off from a router."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2), routers=2, redis=True, purge_lease_seconds=5.0)
    world.faulty = True
    _traffic(world, random.choice((40, 80)), 2.0, seconds=(0, 0.02), pool=10)
    _operate(world, 2.0)
    redis = world.redis
    for _ in range(random.choice((1, 2, 3))):
        at, lasts = random.uniform(0, 1.5), random.choice((0.1, 0.5, 2.0))
        what = random.choice(("down", "hangs", "slow", "loss", "damage", "full", "empty", "cut off", "lies"))
        world.at(at, _harm_redis, world, redis, what)
        world.at(at + lasts, _heal_redis, world, redis)
    world.play(4)
    _traffic(world, 20, 0.5, pool=10, wrong=0, cancels=0)
    world.play(0.5)
    if world.announced:
        # Workers that were cut off must announce themselves again, and routers must read it.
        random.choice(world.workers).move()


def costs(world):
    """Models and Redis become faster and slower, and requests more or less often repeated, so decisions change."""
    random = world.random
    _fleet(
        world,
        kinds=[*_kinds(world, 2), random.choice(("always", "never"))],
        routers=random.choice((2, 3)),
        redis=True,
        local_tier_bytes=random.choice((20_000, 1 << 20)),
    )
    for _ in range(4):
        world.redis.slow = random.choice((0.3, 1.0, 5.0, 30.0))
        seconds = random.choice(((0, 0), (0, 0.001), (0.005, 0.02)))
        _traffic(world, random.choice((40, 120)), 0.4, seconds=seconds, pool=random.choice((4, 20, 1000)))
        _operate(world, 0.4)
        world.play(0.5)
    world.redis.slow = 1.0


def _harm_redis(world, redis, what):
    world.trace("redis", what)
    redis.harmed = True
    if what == "down":
        redis.up = False
    elif what == "hangs":
        redis.hangs = True
    elif what == "slow":
        redis.slow = 200.0
    elif what in ("loss", "damage", "lies"):
        setattr(redis, what, 0.5)
        world.tampered = world.tampered or what != "loss"
    elif what == "full":
        redis.limit, redis.evicts = 500, world.random.random() < 0.5
    elif what == "cut off":
        redis.cut_off = {world.random.choice(world.routers).name}
    else:
        redis.restart(empty=world.random.random() < 0.7)


def _heal_redis(world, redis):
    world.trace("redis", "heals")
    redis.up, redis.hangs, redis.slow = True, False, 1.0
    redis.loss = redis.damage = redis.lies = 0.0
    redis.limit = 0
    redis.cut_off = set()


def poison(world):
    """A request kills the worker that runs it. Its model is hedged: a slow request is sent to a second worker."""
    random = world.random
    _fleet(world, kinds=["hedged"], workers=random.choice((4, 5)), routers=1, threads=2)
    # Enough requests for the router to learn which answers are slow.
    for number in range(70):
        _send(world, number * 0.003, "hedged", number, random.uniform(0.001, 0.003))
    world.play(0.5)
    world.faulty = True
    for number in range(random.choice((1, 2))):
        seconds = random.uniform(0.01, 0.2)
        _send(world, random.uniform(0, 0.1), "hedged", 5000 + number, seconds, poison=1)
    for number in range(20):
        _send(world, random.uniform(0, 0.5), "hedged", 6000 + number)
    world.play(2)
    for worker in world.workers:
        _restart(worker)


def exceptions(world):
    """Unexpected exceptions are raised in the middle of requests."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2, ("plain", "scoped", "fresh", "rows")))
    world.raising = True
    for router in world.routers:
        router.clock_fails = 0.1
    _traffic(world, random.choice((40, 80)), 0.5, seconds=(0, 0.01), pool=10)
    world.play(0.7)
    for router in world.routers:
        router.clock_fails = 0.0


def routers(world):
    """Routers die and restart, while models change and answers are purged."""
    random = world.random
    _fleet(world, kinds=_kinds(world, 2), routers=2, redis=True, purge_lease_seconds=5.0)
    world.faulty = True
    _traffic(world, random.choice((40, 80)), 1.5, seconds=(0, 0.02), pool=10)
    _operate(world, 1.5)
    router, at = random.choice(world.routers), random.uniform(0, 1.2)
    world.at(at, router.kill)
    world.at(at + random.uniform(0.05, 0.5), router.start)
    world.play(2)


def replacement(world):
    """Models are replaced while a worker is killed, stopped, busy or out of a router's reach."""
    random = world.random
    kinds = _kinds(world, 2)
    _fleet(world, kinds=kinds, workers=random.choice((2, 3)), routers=2, purge_lease_seconds=5.0)
    world.faulty = True
    _traffic(world, random.choice((80, 160)), 4.0, seconds=(0, 0.02), pool=6, wrong=0, controls=0)
    for _ in range(random.choice((1, 2, 3))):
        at, lasts = random.uniform(0.1, 2.5), random.choice((0.1, 0.8, 3.0))
        world.at(at, world.switch, random.choice(world.routers), random.choice(kinds))
        worker, begins = random.choice(world.workers), at + random.uniform(-0.1, 0.05)
        way = world.network.way(random.choice(world.routers).name, worker.address)
        what = random.choice(("kill", "stop", "busy", "cut", "dark"))
        if what == "kill":
            world.at(begins, worker.kill, "fault")
            world.at(begins + lasts, _restart, worker)
        elif what == "stop":
            world.at(begins, _stop, world, worker)
            world.at(begins + lasts, _go_on, world, worker)
        elif what == "busy":
            world.at(begins, _be_busy, world, worker, lasts)
        else:
            world.at(begins, _harm, world, way, what)
            world.at(begins + lasts, _heal, world, way)
    world.play(6)
    for worker in world.workers:
        worker.process.go_on()
        _restart(worker)


def _be_busy(world, worker, seconds):
    world.trace("busy", worker.worker_id)
    if worker.process.alive:
        worker.process.held(clock.now_ns + int(seconds * 1e9))


def chaos(world):
    """Many kinds of faults together."""
    random = world.random
    _fleet(
        world,
        kinds=_kinds(world, 3, (*_COORDINATED, "hedged", "queued")),
        workers=random.choice((2, 3, 4)),
        routers=random.choice((2, 3)),
        redis=True,
        purge_lease_seconds=5.0,
        local_tier_bytes=random.choice((20_000, 1 << 20)),
    )
    world.faulty = True
    _traffic(world, random.choice((100, 200)), 2.0, seconds=(0, 0.03), pool=20)
    _operate(world, 2.0)
    for _ in range(random.choice((2, 4))):
        at, lasts = random.uniform(0, 1.5), random.uniform(0.1, 1.5)
        what = random.randrange(4)
        worker = random.choice(world.workers)
        if what == 0:
            world.at(at, worker.kill, "fault")
            world.at(at + lasts, _restart, worker)
        elif what == 1:
            way = world.network.way(random.choice(world.routers).name, worker.address)
            world.at(at, _harm, world, way, random.choice(("cut", "dark", "slow")))
            world.at(at + lasts, _heal, world, way)
        elif what == 2:
            world.at(at, _harm_redis, world, world.redis, random.choice(("down", "slow", "loss", "damage", "cut off")))
            world.at(at + lasts, _heal_redis, world, world.redis)
        else:
            world.at(at, _stop, world, worker)
            world.at(at + lasts, _go_on, world, worker)
    world.play(3.5)
    for worker in world.workers:
        worker.process.go_on()
        _restart(worker)


def _go_on(world, worker):
    world.trace("go on", worker.worker_id)
    worker.process.go_on()


# By name: the plan and its weight in the random choice.
PLANS = {
    "calm": (calm, 22),
    "busy": (busy, 14),
    "slow_request": (slow_request, 6),
    "queue": (queue, 8),
    "tight": (tight, 8),
    "stopped_worker": (stopped_worker, 6),
    "dying_workers": (dying_workers, 8),
    "network": (network, 6),
    "lies": (lies, 7),
    "redis_faults": (redis_faults, 6),
    "costs": (costs, 6),
    "poison": (poison, 4),
    "exceptions": (exceptions, 4),
    "routers": (routers, 4),
    "replacement": (replacement, 4),
    "chaos": (chaos, 3),
}
