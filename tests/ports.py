"""Ports for what tests start."""

import itertools
import os
import random
import socket

# Below those of `ringmesh up` and those that systems hand out for outgoing connections: between our look and the use of
# a port nobody else takes it. Processes of pytest-xdist share no port.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_COUNT = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_OURS = range(10_000 + _WORKER, 15_000, _COUNT)
_NEXT = itertools.cycle(random.SystemRandom().sample(_OURS, len(_OURS)))
# Two of `ringmesh up` that look for free ports at the same time may find the same.
_BLOCK = 100
_BLOCKS = range(15_000 + _BLOCK * _WORKER, 32_000 - _BLOCK, _BLOCK * _COUNT)
_NEXT_BLOCK = itertools.cycle(random.SystemRandom().sample(_BLOCKS, len(_BLOCKS)))


def free_block() -> int:
    """The first port of a block for `ringmesh up --base-port` in which nobody listens."""
    return next(first for first in _NEXT_BLOCK if all(_is_free(port) for port in range(first, first + _BLOCK)))


def free_port() -> int:
    """One of the loopback address that nobody listens on, and none that was handed out lately."""
    return next(port for port in _NEXT if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
