"""Ports for what tests start."""

import itertools
import os
import random
import socket

# Below those of `ringmesh up` and those that systems hand out for outgoing connections: between our look and the use of
# a port nobody else takes it. Processes of pytest-xdist share no port.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_OURS = range(10_000 + _WORKER, 15_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_NEXT = itertools.cycle(random.SystemRandom().sample(_OURS, len(_OURS)))


def free_port() -> int:
    """One of the loopback address that nobody listens on, and none that was handed out lately."""
    for port in _NEXT:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("a cycle does not end")
