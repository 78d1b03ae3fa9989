"""Runs one seed."""

import gc
from typing import NamedTuple

from tests.simulation import plans
from tests.simulation.clock import real_cpu_seconds
from tests.simulation.world import World


class Result(NamedTuple):
    """The result of a seed; `digest` is over all its events."""

    seed: int
    plan: str
    violations: list[str]
    events: int
    calls: int
    digest: str
    seconds: float


# Seeds between garbage collections; a collection takes as long as a small seed. It frees coroutines, whose `finally`
# blocks run, so it happens between seeds only.
gc.disable()
_COLLECTED_EVERY = 16
_seeds = 0


def run(seed, plan="", show=None):
    """Runs a seed. The result does not depend on the process or on earlier seeds."""
    global _seeds
    began = real_cpu_seconds()
    world = World(seed, show=show)
    name = plan or plans.choose(world)
    try:
        world.run(plans.PLANS[name][0])
        result = Result(
            seed, name, [*world.violations], world.events, len(world.calls), world.digest, real_cpu_seconds() - began
        )
    finally:
        # After the result, so that no coroutine that is closed now can change it.
        world.loop.abandon()
    del world
    _seeds += 1
    if _seeds % _COLLECTED_EVERY == 1:
        gc.collect()
        if _seeds == 1:
            # Objects loaded for all seeds are excluded from later collections.
            gc.freeze()
    return result
