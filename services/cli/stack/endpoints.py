"""The endpoints of a stack: one block of 100 ports, or free ports."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from services.cli.errors import CommandError

LOOPBACK = "127.0.0.1"
BLOCK = 100
# Offsets in the block, whose first port is the router's. Routers share that port but not their /metrics.
_ROUTER_METRICS, _CACHE, _VALKEY, _CACHE_METRICS, _SPANS, _CONSOLE_METRICS, _PAGES = 1, 9, 10, 11, 12, 13, 79
_LEDGER, _LEDGER_METRICS = 14, 15
_WORKERS, _WORKER_METRICS = 19, 49
_MOST_WORKERS = _WORKER_METRICS - _WORKERS
# Below the ephemeral range, from which an outgoing connection could take a port between the check and its use.
_FREE_RANGE = range(15000, 32000)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """host:port of each process, as other processes reach it. `metrics`: of each /metrics, by process.

    Routers, `pages` and /metrics listen on `host`; `pages` are the console's. All others listen on the loopback
    address, because they trust their callers.
    """

    host: str
    router: str
    cache: str
    valkey: str
    spans: str
    ledger: str
    pages: str
    workers: tuple[str, ...]
    metrics: dict[str, str]

    @classmethod
    def create(cls, host: str, base: int, workers: int, routers: int = 1) -> Endpoints:
        """Returns the block that starts at port `base`, or free ports if it is 0. Raises CommandError."""
        if base and workers > _MOST_WORKERS:
            raise CommandError(
                f"a block of {BLOCK} ports has room for {_MOST_WORKERS} workers; use free ports: --base-port 0"
            )
        if base + BLOCK > 65536:
            raise CommandError(f"the last port of the block is {base + BLOCK - 1}; choose a lower --base-port")
        free = _free_ports()
        near = LOOPBACK if host in ("0.0.0.0", "::") else host  # noqa: S104

        def at(offset: int, host: str = LOOPBACK) -> str:
            return _address(host, base + offset if base else next(free))

        names = ["router"] if routers == 1 else [f"router-{number}" for number in range(routers)]
        metrics = {name: at(_ROUTER_METRICS + number, near) for number, name in enumerate(names)}
        metrics["cache"] = at(_CACHE_METRICS, near)
        metrics |= {f"worker-{number}": at(_WORKER_METRICS + number, near) for number in range(workers)}
        metrics["console"] = at(_CONSOLE_METRICS, near)
        metrics["ledger"] = at(_LEDGER_METRICS, near)
        return cls(
            host,
            router=at(0, near),
            cache=at(_CACHE),
            valkey=at(_VALKEY),
            spans=at(_SPANS),
            ledger=at(_LEDGER),
            pages=at(_PAGES, near),
            workers=tuple(at(_WORKERS + number) for number in range(workers)),
            metrics=metrics,
        )

    @property
    def routers(self) -> list[str]:
        """The names of the routers: `router`, or `router-0`, `router-1` and so on if there are several."""
        return [name for name in self.metrics if name.startswith("router")]

    def listen(self, address: str) -> str:
        """Returns the address on which the process listens that others reach at `address`."""
        exposed = (self.router, self.pages, *self.metrics.values())
        return _address(self.host, _port(address)) if address in exposed else address

    def check_free(self, *, valkey: bool) -> None:
        """Raises CommandError with the first port in use and its process. `valkey`: whether Valkey's port is needed."""
        internal = (self.cache, self.spans, self.ledger, *self.workers, *((self.valkey,) if valkey else ()))
        for address in (self.router, self.pages, *internal, *self.metrics.values()):
            host, port = self.listen(address).rpartition(":")[0].strip("[]"), _port(address)
            error = _listen_error(host, port)
            if error is not None and error.errno == errno.EADDRINUSE:
                raise CommandError(f"port {port} is in use{_owner(port)}; choose another with --base-port")
            if error is not None:
                cause = str(error.strerror).partition(" (while")[0]
                raise CommandError(f"cannot listen on {host}: {cause}; name an address of this host by --host")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _free_ports() -> Iterator[int]:
    """Yields random ports that are free at present. Raises CommandError at the end of the range."""
    for port in random.sample(_FREE_RANGE, len(_FREE_RANGE)):
        if _listen_error(LOOPBACK, port) is None:
            yield port
    raise CommandError("there are not enough free ports on this machine")


def _listen_error(host: str, port: int) -> OSError | None:
    """Returns why no process can listen there; None if one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Uses SO_REUSEADDR, as servers do, so that closed connections in TIME_WAIT do not occupy the port.
        socket.create_server((host, port), family=family, backlog=1).close()
    except OSError as error:
        return error
    return None


def _owner(port: int) -> str:
    """Returns the process on the port, if the system shows it; other users' processes can be hidden."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
