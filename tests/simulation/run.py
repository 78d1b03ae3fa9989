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
_seeds = 0


def run(seed, plan="", show=None):
    """The same in each process and at each time."""
    global _seeds
    began = real_cpu_seconds()
    world = World(seed, show=show)
    name = plan or plans.choose(world)
    world.run(plans.PLANS[name][0])
    result = Result(
        seed, name, world.violations, world.events, len(world.calls), world.digest, real_cpu_seconds() - began
    )
    del world
    _seeds += 1
    if _seeds % _COLLECTED_EVERY == 1:
        gc.collect()
        if _seeds == 1:
            # What was loaded for all seeds is not garbage of any.
            gc.freeze()
    return result
