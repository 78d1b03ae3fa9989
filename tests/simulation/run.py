"""One seed, from its fleet to its verdict."""

import gc
from typing import NamedTuple

from tests.simulation import plans
from tests.simulation.clock import real_cpu_seconds
from tests.simulation.world import World


class Result(NamedTuple):
    """What came of a seed; `digest` is of all events in it."""

    seed: int
    plan: str
    violations: list[str]
    events: int
    calls: int
    digest: str
    seconds: float


# Seeds until garbage is collected, which takes as long as a small one.
_COLLECTED_EVERY = 16
_since_collected = 0


def run(seed, plan="", show=None):
    """The same in each process and at each time."""
    global _since_collected
    began = real_cpu_seconds()
    world = World(seed, show=show)
    name = plan or plans.choose(world)
    world.run(plans.PLANS[name][0])
    result = Result(
        seed, name, world.violations, world.events, len(world.calls), world.digest, real_cpu_seconds() - began
    )
    del world
    _since_collected -= 1
    if _since_collected < 0:
        _since_collected = _COLLECTED_EVERY
        gc.collect()
        # What was loaded for all seeds is not garbage of any.
        gc.freeze()
    return result
