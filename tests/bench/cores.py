"""Throughput by number of cores: what `ringmesh up` serves on 1, 2, 4 and so on, as far as this machine goes.

    python -m tests.bench.cores [--cores 1 --cores 2 --cores 3] [--seconds 3] [--rounds 3]

Servers and load generators share the cores, as in `make bench`; there is a router for each core, 8 at most, and a
generator for each two. Hits are drawn evenly from 1,000 magika requests that were computed before, so that each router
is asked for all of them: what one has not in its local tier comes from Redis (the kernel gives connections, not keys,
to routers). Misses are those of the tiny MLP.
"""

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench import models, peers
from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, load
from tests.bench.models import MAGIKA, MLP
from tests.bench.routers import outcomes

BODIES = 1_000
OUTSTANDING_A_CORE = 32
MOST_ROUTERS = 8


def doubling(cores: int) -> list[int]:
    """Returns 1, 2, 4 and so on below `cores`, and `cores` itself."""
    return [*(1 << power for power in range((cores - 1).bit_length())), cores]


def measure(loadgen: Path, work: Path, cores: int, seconds: float, rounds: int) -> dict[str, float]:
    """Returns the median hits and misses a second, and the share of each outcome among the hit requests."""
    routers = min(cores, MOST_ROUTERS)
    options = {"outstanding": OUTSTANDING_A_CORE * cores, "generators": (cores + 1) // 2}
    state = work / f"state-{cores}"
    with peers.ringmesh_up("", loadgen, work / "models", state, "--routers", str(routers)) as server:
        metrics = [address for name, address in server.front.stack["metrics"].items() if name.startswith("router")]

        def counted() -> Counter[str]:
            return sum((outcomes(address) for address in metrics), Counter())

        filled, bodies = 0, work / MAGIKA.name
        while filled < BODIES:
            filled += load(
                loadgen, server.front, bodies, order="seq", offset=filled, outstanding=16, seconds=1, warm_up=0
            ).calls
        before = counted()
        hits = [load(loadgen, server.front, bodies, order="uniform", seconds=seconds, **options) for _ in range(rounds)]
        came = counted() - before
        stamp, misses, bodies = 1, [], work / MLP.name
        for _ in range(rounds):
            misses.append(load(loadgen, server.front, bodies, order="seq", seconds=seconds, stamp=stamp, **options))
            stamp += misses[-1].calls
    failed = sum((Counter(run.errors) for run in (*hits, *misses)), Counter())
    if failed:
        raise RuntimeError(f"calls failed on {cores} cores: {dict(failed)}")
    return {
        "hits": statistics.median(run.rps for run in hits),
        "misses": statistics.median(run.rps for run in misses),
        **{outcome: came[outcome] / came.total() for outcome in ("hit-local", "hit-shared", "miss")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cores", description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, action="append", help="may be repeated")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    here: Sequence[int] = sorted(os.sched_getaffinity(0))
    columns = ("cores", "hits/s", "by one core", "misses/s", "by one core", "local", "from Redis", "computed again")
    table = Table(*columns, title="ringmesh up, a router for each core")
    loadgen = build_loadgen()
    with tempfile.TemporaryDirectory(prefix="ringmesh-cores-") as folder:
        work = Path(folder)
        rng = np.random.default_rng(1)
        for model in (MAGIKA, MLP):
            models.write(model, work / "models")
            write_bodies(work / model.name, model.name, model.input, (model.row(rng) for _ in range(BODIES)))
        first: dict[str, float] = {}
        for cores in arguments.cores or doubling(len(here)):
            # The affinity is inherited by all processes started below, as with taskset.
            os.sched_setaffinity(0, here[:cores])
            found = measure(loadgen, work, cores, arguments.seconds, arguments.rounds)
            first = first or found
            rates = [text for kind in ("hits", "misses")
                     for text in (f"{found[kind]:,.0f}", f"{found[kind] / first[kind]:.2f}")]  # fmt: skip
            shares = (f"{found[outcome]:.1%}" for outcome in ("hit-local", "hit-shared", "miss"))
            table.add_row(str(cores), *rates, *shares)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
