"""`make soak MINUTES=N`: everything at once against the stack that `ringmesh up` starts, with faults all the while.

Exits with 1 where an answer is wrong, a call does not end, or more than one in 10,000 valid requests has no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import valkey

from tests import installation, models
from tests.soak import faults, report
from tests.soak.traffic import Callers, Questions
from tests.soak.watch import Watch
from tests.system.conftest import start_stack, stop_stack

# Small, so that it is full all the time.
SETTINGS = {
    "RINGMESH_LOCAL_TIER_BYTES": str(8 << 20),
    "RINGMESH_REFUSAL_SECONDS": "1",
    "RINGMESH_TRACE_RATIO": "0.05",
    "RINGMESH_MAX_MESSAGE_BYTES": str(12 << 20),
}
PAGE = Path(__file__).parents[2] / "docs/soak.md"
REDIS_BYTES = 16 << 20
BETWEEN_FAULTS_SECONDS = 8.0
QUIET_SECONDS = 8.0


async def soak(seconds: float, seed: int) -> tuple[str, bool]:
    """The page with what was found, and whether the run passed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ringmesh-soak-") as folder:
        repository = models.build(Path(folder, "models"))
        os.environ |= SETTINGS
        stack = await asyncio.to_thread(
            start_stack, Path(folder, "state"), "--models", str(repository), "--routers", "2", "--drain", "5"
        )
        try:
            described = await asyncio.to_thread(_described, stack.state)
            ports = {name: int(address.rpartition(":")[2]) for name, address in _addresses(described).items()}
            pids = {**stack.pids}

            def pids_now() -> dict[str, int]:
                with suppress(OSError, ValueError):  # it is being written
                    pids.update(stack.pids)
                return pids

            watch = Watch(pids_now, described["metrics"])
            callers = Callers(stack.router, Questions(repository, draw), draw)
            struck: Counter[tuple[str, str]] = Counter()
            calling = asyncio.create_task(callers.run())
            watching = asyncio.create_task(watch.run())
            until = time.monotonic() + seconds
            for fault in faults.schedule():
                if time.monotonic() + BETWEEN_FAULTS_SECONDS > until or calling.done():
                    break
                _fill_redis(described["redis_url"])
                await asyncio.sleep(BETWEEN_FAULTS_SECONDS)
                print(f"{time.strftime('%H:%M:%S')} {fault.kind} {fault.target}", flush=True)
                if await faults.strike(fault, lambda name: pids_now().get(name, 0), ports.__getitem__):
                    struck[fault.kind, fault.target] += 1
            await asyncio.sleep(max(0.0, until - time.monotonic()))
            callers.stop()
            await calling
            await asyncio.sleep(QUIET_SECONDS)
            watching.cancel()
            left = await asyncio.to_thread(watch.in_flight)
            page, passed = report.write(seconds, seed, callers.tallies, struck, watch.slopes(), left)
            return page, passed
        finally:
            code = await asyncio.to_thread(stop_stack, stack)
            print(f"the stack ended with code {code}")


def _described(state: str) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(Path(state, "stack.json").read_text())
    return described


def _addresses(described: dict[str, Any]) -> dict[str, str]:
    """host:port by process."""
    workers = {f"worker-{number}": address for number, address in enumerate(described["workers"])}
    router = described["router"]
    redis = urlsplit(described["redis_url"])
    return {
        **workers,
        "router-0": router,
        "router-1": router,
        "cache": described["cache"],
        "valkey": f"{redis.hostname}:{redis.port}",
    }


def _fill_redis(url: str) -> None:
    """One that was started again has its room back."""
    with suppress(valkey.ValkeyError), valkey.Valkey.from_url(url, socket_timeout=1) as client:
        client.config_set("maxmemory", REDIS_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--seed", type=int, default=1, help="of the questions; the schedule of faults is always the same"
    )
    parser.add_argument("--write", action="store_true", help="writes docs/soak.md")
    arguments = parser.parse_args()
    installation.import_compiled()
    page, passed = asyncio.run(soak(arguments.minutes * 60, arguments.seed))
    print(page)
    if arguments.write:
        PAGE.write_text(page)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
