"""The schedule of faults: one at a time, in a fixed order, each for workers, Redis, cache and router."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STOPPED_SECONDS = 4.0
TARGETS = ("worker-0", "valkey", "router-0", "cache", "worker-1", "router-1")
KINDS = ("kill", "stop", "cut")


@dataclass(frozen=True)
class Fault:
    """`kill`: SIGKILL. `stop`: SIGSTOP for STOPPED_SECONDS. `cut`: a reset of every TCP connection of its port."""

    kind: str
    target: str


def schedule() -> Iterator[Fault]:
    """Without end; every kind for every target, before any comes again."""
    for kind, target in itertools.cycle(itertools.product(KINDS, TARGETS)):
        yield Fault(kind, target)


async def strike(fault: Fault, pid_of: Callable[[str], int], port_of: Callable[[str], int]) -> bool:
    """Returns when it is over; False where there was nobody to strike."""
    pid = pid_of(fault.target)
    if not pid:
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
            port = port_of(fault.target)
            command = ["ss", "--kill", "--tcp", "src", "127.0.0.1", "sport", "=", f":{port}"]
            await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=10)
    except ProcessLookupError:
        return False
    return True
