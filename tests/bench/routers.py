"""How evenly routers that share a port share the work, and what the shared tier makes up for.

    python -m tests.bench.routers

The kernel spreads connections, not requests. Bodies are asked for by a Zipf distribution, so that what one router has
in its local tier, another lacks.
"""

import argparse
import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from services.cli.stack.probes import healthy_workers
from services.console.data.scraper import fetch
from tests.bench import models
from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, running
from tests.bench.models import MLP
from tests.ports import free_port
from tests.valkeys import valkey_server

BODIES = 10_000
console = Console(width=140)


@contextmanager
def sharing(repository: Path, count: int, redis: str | None, age: float) -> Iterator[tuple[int, list[str]]]:
    """Starts `count` routers on one port, and a worker behind them. Yields the port and their /metrics addresses."""
    with ExitStack() as stack:
        worker, port = free_port(), free_port()
        serving = {"port": worker, "address": f"127.0.0.1:{worker}", "models": str(repository), "threads": "1"}
        stack.enter_context(running("services.inference", **serving))
        metrics = []
        for _ in range(count):
            metrics.append(f"127.0.0.1:{free_port()}")
            settings = {"workers": f"127.0.0.1:{worker}", "share_port": "true", "metrics_address": metrics[-1]}
            settings |= {"max_connection_age_seconds": str(age), "queue_seconds": "30", "audit_share": "0"}
            if redis:
                settings |= {"redis_url": redis, "key_secret": "bench"}
            stack.enter_context(running("router", port=port, address=f"127.0.0.1:{port}", **settings))
        for target in metrics:  # on the shared port, another router may have answered
            while not asyncio.run(healthy_workers(target)):
                time.sleep(0.02)
        yield port, metrics


def outcomes(metrics: str) -> Counter[str]:
    """Returns the number of a router's answers by outcome."""
    counts: Counter[str] = Counter()
    for labels, value in re.findall(r"^ringmesh_requests_total\{(.*)\} (\S+)$", fetch(metrics), re.MULTILINE):
        counts[re.search(r'outcome="([^"]*)"', labels)[1]] += int(float(value))
    return counts


def run(loadgen: Path, bodies: Path, port: int, connections: int, seconds: float) -> dict[str, int]:
    """Runs the load generator and returns its counts."""
    command = [
        loadgen, "--target", f"127.0.0.1:{port}", "--bodies", bodies, "--order", "zipf:1.0", "--concurrency", 64,
        "--connections", connections, "--seconds", seconds, "--warmup", 0,
    ]  # fmt: skip
    return json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    arguments = parser.parse_args()
    seconds, several, young = arguments.seconds, arguments.routers, arguments.seconds / 16
    loadgen = build_loadgen()
    names = ("routers", "connections", "their age", "Redis", "req/s", "share of each", "most over mean")
    table = Table(*names, "hits", "from Redis", "runs a key", "errors")
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder:
        work = Path(folder)
        # Routers would not use Redis for so quick a model.
        always = 'parameters { key: "ringmesh_shared_tier" value { string_value: "always" } }'
        models.write(MLP, work / "models", models.CONFIG + always)
        rng = np.random.default_rng(1)
        bodies = write_bodies(work / "bodies", "mlp", "x", rng.random((BODIES, 1, 64), dtype=np.float32))
        for count, connections, age, with_redis in (
            (1, 64, 300, True),
            (several, 64, 300, True),
            (several, 64, 300, False),
            (several, 4, 300, True),
            (several, 4, young, True),
            (several, 64, young, True),
        ):
            with ExitStack() as stack:
                redis = None
                if with_redis:
                    redis = stack.enter_context(valkey_server()).connection_url
                port, metrics = stack.enter_context(sharing(work / "models", count, redis, age))
                result = run(loadgen, bodies, port, connections, seconds)
                found = [outcomes(target) for target in metrics]
            answers = [counts.total() for counts in found]
            total = sum(found, Counter())
            table.add_row(
                *(str(count), str(connections), f"{age:g} s", "yes" if with_redis else "no", f"{result['rps']:,.0f}"),
                " ".join(f"{answered / total.total():.0%}" for answered in answers),
                f"{max(answers) * count / total.total():.2f}",
                f"{(total['hit-local'] + total['hit-shared']) / total.total():.1%}",
                f"{total['hit-shared'] / total.total():.1%}",
                f"{total['miss'] / result['distinct']:.2f}",
                str(sum(result["errors"].values())),
            )
    console.print(table)


if __name__ == "__main__":
    main()
