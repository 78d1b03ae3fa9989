"""`make soak MINUTES=N`: everything at once against the stack that `ringmesh up` starts, with faults all the while.

Exits with 1 where an answer is wrong, a call does not end, or more than one in 10,000 valid requests has no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
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
from tests.soak.identity import Identity
from tests.soak.intruders import IdentifiedCallers
from tests.soak.traffic import Callers, PlainText, Questions
from tests.soak.watch import SETTLED_SECONDS, Watch
from tests.system.conftest import start_stack, stop_stack

# Small, so that it is full all the time.
SETTINGS = {
    "RINGMESH_LOCAL_TIER_BYTES": str(8 << 20),
    "RINGMESH_REFUSAL_SECONDS": "1",
    "RINGMESH_TRACE_RATIO": "0.05",
    "RINGMESH_MAX_MESSAGE_BYTES": str(12 << 20),
}
DOCS = Path(__file__).parents[2] / "docs"
REDIS_BYTES = 16 << 20
BETWEEN_FAULTS_SECONDS = 8.0
QUIET_SECONDS = 8.0


async def soak(seconds: float, seed: int, *, with_identity: bool) -> tuple[str, bool]:
    """The page with what was found, and whether the run passed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ringmesh-soak-") as folder:
        repository = models.build(Path(folder, "models"))
        os.environ |= SETTINGS
        identity = Identity(Path(folder, "identity")) if with_identity else None
        arguments = ["--models", str(repository), "--routers", "2", "--drain", "5"]
        settings: dict[str, str] = {}
        if identity is not None:
            arguments += identity.arguments()
            settings = identity.settings()
        stack = await asyncio.to_thread(start_stack, Path(folder, "state"), *arguments, **settings)
        try:
            described = await asyncio.to_thread(_described, stack.state)
            addresses = _addresses(described)
            questions = Questions(repository, draw)
            if identity is not None:
                # Routers are on Unix sockets behind it.
                addresses["edge"] = identity.target = _edge(stack.output)
                callers: Callers = IdentifiedCallers(identity, questions, draw, addresses)
            else:
                callers = Callers(PlainText(stack.router), questions, draw)
            ports = {name: int(address.rpartition(":")[2]) for name, address in addresses.items()}
            pids = {**stack.pids}

            def pids_now() -> dict[str, int]:
                with suppress(OSError, ValueError):  # it is being written
                    pids.update(stack.pids)
                return pids

            watch = Watch(pids_now, described["metrics"], SETTLED_SECONDS if seconds > 3 * SETTLED_SECONDS else 30.0)
            struck: Counter[tuple[str, str]] = Counter()
            calling = asyncio.create_task(callers.run())
            others = [asyncio.create_task(watch.run())]
            if identity is not None:
                others += [
                    asyncio.create_task(identity.rotate_keys()),
                    asyncio.create_task(identity.rotate_certificates()),
                ]
            until = time.monotonic() + seconds
            for fault in faults.schedule([*faults.TARGETS, *(["edge"] if identity is not None else [])]):
                if time.monotonic() + BETWEEN_FAULTS_SECONDS > until or any(task.done() for task in (calling, *others)):
                    break
                # Then processes live for long enough to show what they keep.
                if fault.kind == "kill" and time.monotonic() > until - seconds / 2:
                    continue
                _fill_redis(described["redis_url"])
                await asyncio.sleep(BETWEEN_FAULTS_SECONDS)
                print(f"{time.strftime('%H:%M:%S')} {report.so_far(callers.tallies)}; {fault}", flush=True)
                if await faults.strike(fault, pids_now().get(fault.target, 0), ports.get(fault.target, 0)):
                    struck[fault.kind, fault.target] += 1
            await asyncio.sleep(max(0.0, until - time.monotonic()))
            callers.stop()
            await calling
            await asyncio.sleep(QUIET_SECONDS)
            for task in others:
                task.cancel()
            for ended in await asyncio.gather(*others, return_exceptions=True):
                if not isinstance(ended, asyncio.CancelledError):
                    raise RuntimeError("the watch or a rotation ended") from ended
            left = await asyncio.to_thread(watch.in_flight)
            return report.write(seconds, seed, callers, struck, watch.slopes(), watch.memory(), left)
        finally:
            code = await asyncio.to_thread(stop_stack, stack)
            print(f"the stack ended with code {code}")


def _described(state: str) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(Path(state, "stack.json").read_text())
    return described


def _addresses(described: dict[str, Any]) -> dict[str, str]:
    """host:port by process; not of routers on Unix sockets."""
    workers = {f"worker-{number}": address for number, address in enumerate(described["workers"])}
    router = described["router"]
    redis = urlsplit(described["redis_url"])
    return {
        **workers,
        **({} if router.startswith("unix:") else {"router-0": router, "router-1": router}),
        "cache": described["cache"],
        "valkey": f"{redis.hostname}:{redis.port}",
    }


def _edge(output: str) -> str:
    """host:port of the TLS edge, as `ringmesh up` prints it."""
    found = re.search(r"✓ edge +(\S+)", output)
    assert found is not None, output
    return found[1]


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
    parser.add_argument("--identity", action="store_true", help="TLS, API keys and their rotation, and intruders")
    parser.add_argument("--write", action="store_true", help="writes docs/soak.md, or docs/soak-identity.md")
    arguments = parser.parse_args()
    installation.import_compiled()
    page, passed = asyncio.run(soak(arguments.minutes * 60, arguments.seed, with_identity=arguments.identity))
    print(page)
    if arguments.write:
        (DOCS / ("soak-identity.md" if arguments.identity else "soak.md")).write_text(page)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
