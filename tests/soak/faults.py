"""The schedule of faults: one at a time, in a fixed order, each for workers, Redis, cache, router and TLS edge."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STOPPED_SECONDS = 4.0
TARGETS = ("worker-0", "valkey", "router-0", "cache", "worker-1", "router-1")
KINDS = ("kill", "stop", "cut")


@dataclass(frozen=True)
class Fault:
    """`kill`: SIGKILL. `stop`: SIGSTOP for STOPPED_SECONDS. `cut`: a reset of every TCP connection of its port."""

    kind: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind} {self.target}"


def schedule(targets: Sequence[str]) -> Iterator[Fault]:
    """Without end; every kind for every target, before any comes again."""
    for kind, target in itertools.cycle(itertools.product(KINDS, targets)):
        yield Fault(kind, target)


async def strike(fault: Fault, pid: int, port: int) -> bool:
    """Returns when it is over; False where there was nobody to strike: a pid of 0, or no TCP port."""
    if not pid or (fault.kind == "cut" and not port):
        return False
    try:
        if fault.kind == "kill":
            os.kill(pid, signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(STOPPED_SECONDS)
            finally:
                os.kill(pid, signal.SIGCONT)
        else:
            command = ["ss", "--kill", "--tcp", "src", "127.0.0.1", "sport", "=", f":{port}"]
            await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=10)
    except ProcessLookupError:
        return False
    return True
