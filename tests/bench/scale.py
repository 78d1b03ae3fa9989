"""How speed and memory change with what is held: entries, ring members, models; and how long a start takes.

    python -m tests.bench.scale

Entries: a router whose local tier is filled before it serves, asked for 10,000 of them in equal shares. Models: a
worker and a router that hold so many, asked for one. Ring: in process, since a hit never looks at it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from router.balancing.ring import Ring
from tests.bench import models
from tests.bench.bodies import write_bodies
from tests.bench.harness import Measured, Process, build_loadgen, load, running
from tests.bench.models import IDENTITY, MLP
from tests.ports import free_port

# Number of bodies that are requested; the other entries are never requested.
ASKED = 10_000
# Size of an answer.
VALUE_BYTES = 64
console = Console(width=120)


@contextmanager
def serving(repository: Path, entries: int = 0) -> Iterator[tuple[Process, Process]]:
    """Starts a router with `entries` entries, and its worker."""
    port = free_port()
    with running(
        "services.inference", port=port, address=f"127.0.0.1:{port}", models=str(repository), threads="1", patience=180
    ) as worker:
        workers, port = f"127.0.0.1:{port}", free_port()
        settings = {
            "workers": workers,
            "local_tier_bytes": str(4 << 30),
            "entries": str(entries),
            "value_bytes": str(VALUE_BYTES),
        }
        with running("tests.bench.filled_router", port=port, address=f"127.0.0.1:{port}", **settings) as router:
            yield router, worker


def row(table: Table, what: str, runs: Sequence[Measured], *more: str) -> None:
    """Adds a row with medians and the spread of the rate."""
    rates = [run.rps for run in runs]
    p50, p99, cpu = (statistics.median(getattr(run, name) for run in runs) for name in ("p50", "p99", "cpu_us"))
    rate, spread = f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}"
    table.add_row(what, rate, spread, f"{p50:.2f}", f"{p99:.2f}", f"{cpu:.0f}", *more)


def entries(loadgen: Path, work: Path, seconds: float, rounds: int) -> Table:
    """Measures 1 entry, 10,000 and a million."""
    models.write(IDENTITY, work / "one")
    rng = np.random.default_rng(1)
    bodies = write_bodies(work / "small", "identity", "x", (IDENTITY.row(rng, 8) for _ in range(ASKED)))
    table = Table("entries", "hits/s", "spread", "p50 ms", "p99 ms", "CPU µs", "router MB", "bytes an entry")
    sizes = (1, ASKED, 1_000_000)
    with serving(work / "one") as one, serving(work / "one") as few, serving(work / "one", 1_000_000 - ASKED) as many:
        empty = one[0].resident_bytes()
        full = many[0].resident_bytes()
        routers = dict(zip(sizes, (one[0], few[0], many[0]), strict=True))
        runs: dict[int, list[Measured]] = {size: [] for size in sizes}
        for size in sizes[1:]:
            load(loadgen, routers[size], bodies, order="seq", outstanding=64, seconds=6, warm_up=0)
        for _ in range(rounds):
            for size, router in routers.items():
                order = "one" if size == 1 else "uniform"
                runs[size].append(load(loadgen, router, bodies, order=order, outstanding=64, seconds=seconds))
        for size, router in routers.items():
            each = f"{(full - empty) / (size - ASKED):.0f}, {VALUE_BYTES} of them the answer" if size > ASKED else ""
            row(table, f"{size:,}", runs[size], f"{router.resident_bytes() / 2**20:.0f}", each)
    return table


def held_models(loadgen: Path, work: Path, seconds: float, rounds: int) -> Table:
    """Measures 1 model, 100 and a thousand: hits, and misses of a tiny MLP."""
    sizes = (1, 100, 1000)
    models.write(MLP, work / "mlp-1")
    for size in sizes[1:]:
        repository = work / f"mlp-{size}"
        models.write(MLP, repository)
        for number in range(1, size):
            (repository / f"other{number}").mkdir()
            (repository / f"other{number}" / "1").symlink_to(work / "mlp-1" / "mlp" / "1")
    rng = np.random.default_rng(1)
    bodies = write_bodies(work / "rows", "mlp", "x", (MLP.row(rng) for _ in range(8)))
    table = Table(
        "models", "req/s", "spread", "p50 ms", "p99 ms", "CPU µs", "router, worker MB", "worker ready after s"
    )
    with serving(work / "mlp-1") as one, serving(work / "mlp-100") as some, serving(work / "mlp-1000") as many:
        fleets = dict(zip(sizes, (one, some, many), strict=True))
        for kind, order in (("hits", "one"), ("misses", "seq")):
            runs: dict[int, list[Measured]] = {size: [] for size in sizes}
            stamps = dict.fromkeys(sizes, 1)
            for _ in range(rounds):
                for size, (router, worker) in fleets.items():
                    stamp = stamps[size] if kind == "misses" else 0
                    measured = load(loadgen, router, bodies, order=order, outstanding=64, seconds=seconds, stamp=stamp,
                                    also=[worker])  # fmt: skip
                    stamps[size] += measured.calls
                    runs[size].append(measured)
            for size, (router, worker) in fleets.items():
                memory = f"{router.resident_bytes() / 2**20:.0f}, {worker.resident_bytes() / 2**20:.0f}"
                row(table, f"{size:,}, {kind}", runs[size], memory, f"{worker.ready_seconds:.1f}")
    return table


def ring_members() -> Table:
    """Measures 1 ring member, 30 and 300: a look-up, and a change of membership."""
    table = Table("members", "look-up µs", "new ring ms", "table KB")
    hashes = [os.urandom(16) for _ in range(10_000)]
    for size in (1, 30, 300):
        members = {f"10.0.{number // 250}.{number % 250}:8100": 1.0 for number in range(size)}
        made = []
        for _ in range(5):
            start = time.perf_counter()
            ring = Ring(members)
            made.append(time.perf_counter() - start)
        looked_up = []
        for _ in range(5):
            start = time.perf_counter()
            for request_hash in hashes:
                ring.ranked(request_hash)
            looked_up.append((time.perf_counter() - start) / len(hashes))
        assert ring._table is not None
        table.add_row(str(size), f"{min(looked_up) * 1e6:.2f}", f"{min(made) * 1e3:.0f}", f"{ring._table.nbytes >> 10}")
    return table


def starts(work: Path, rounds: int) -> Table:
    """Measures the time from exec to SERVING, of a worker with a tiny model and of a router whose worker is up."""
    models.write(MLP, work / "start")
    router, worker = [], []
    for _ in range(rounds):
        with serving(work / "start") as (one, other):
            router.append(one.ready_seconds)
            worker.append(other.ready_seconds)
    table = Table("start to ready, s", "median", "spread")
    for name, seconds in (("router", router), ("worker, a tiny MLP", worker)):
        table.add_row(name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="entries, models, ring, starts; all where none is named")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    loadgen = build_loadgen()
    with tempfile.TemporaryDirectory(prefix="ringmesh-scale-") as folder:
        measures = {
            "ring": ring_members,
            "starts": lambda: starts(Path(folder), 5),
            "entries": lambda: entries(loadgen, Path(folder), arguments.seconds, arguments.rounds),
            "models": lambda: held_models(loadgen, Path(folder), arguments.seconds, arguments.rounds),
        }
        for name in arguments.what or measures:
            console.print(measures[name]())


if __name__ == "__main__":
    main()
