"""The ports of a stack, and whether they are free."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass

import psutil

from services.cli.errors import CommandError

HOST = "127.0.0.1"
# Offsets from the router's port, so that one option moves a whole stack: 8001, 8010, 8011, 8100, 8101, ...
_CACHE, _VALKEY, _WORKERS = 9, 10, 99
# Offsets of metrics ports: 8002 (up to 8009 if routers share a port), 8012, 8200, 8201, ...
_ROUTER_METRICS, _CACHE_METRICS, _WORKER_METRICS = 1, 11, 199
# Offsets of the console's ports: 8080 for browsers, 8013 for spans, 8014 for metrics.
_PAGES, _SPANS, _CONSOLE_METRICS = 79, 12, 13
# Offsets of the ledger's ports: 8015, and 8016 for metrics.
_LEDGER, _LEDGER_METRICS = 14, 15
# Below the ephemeral range, from which an outgoing connection could take a port between the check and its use.
_FREE_RANGE = range(15000, 32000)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one stack, all on the loopback address. Routers share a port, but each has its own metrics port."""

    router: int
    cache: int
    valkey: int
    workers: tuple[int, ...]
    router_metrics: tuple[int, ...]
    cache_metrics: int
    worker_metrics: tuple[int, ...]
    pages: int
    spans: int
    console_metrics: int
    ledger: int
    ledger_metrics: int

    @classmethod
    def from_base(cls, port: int, workers: int, routers: int = 1) -> Ports:
        """Returns the router on `port` and the others at fixed offsets. Raises CommandError if they exceed 65535."""
        if port + _WORKER_METRICS + workers - 1 > 65535:
            raise CommandError(f"port {port} leaves no room for the ports behind it; choose a lower one with --port")
        return cls(
            port,
            port + _CACHE,
            port + _VALKEY,
            tuple(port + _WORKERS + number for number in range(workers)),
            tuple(port + _ROUTER_METRICS + number for number in range(routers)),
            port + _CACHE_METRICS,
            tuple(port + _WORKER_METRICS + number for number in range(workers)),
            port + _PAGES,
            port + _SPANS,
            port + _CONSOLE_METRICS,
            port + _LEDGER,
            port + _LEDGER_METRICS,
        )

    @classmethod
    def free(cls, workers: int, routers: int = 1) -> Ports:
        """Returns random ports that are free at present. Raises CommandError if there are too few."""
        candidates = random.sample(_FREE_RANGE, len(_FREE_RANGE))
        found: list[int] = []
        while len(found) < 2 * workers + routers + 9:
            if not candidates:
                raise CommandError("there are not enough free ports on this machine")
            port = candidates.pop()
            if not _is_taken(port):
                found.append(port)
        router, cache, valkey, cache_metrics, pages, spans, console_metrics, ledger, ledger_metrics, *rest = found
        of_workers, worker_metrics = tuple(rest[:workers]), tuple(rest[workers : 2 * workers])
        metrics = (tuple(rest[2 * workers :]), cache_metrics, worker_metrics)
        return cls(router, cache, valkey, of_workers, *metrics, pages, spans, console_metrics, ledger, ledger_metrics)

    def check_free(self, *, valkey: bool) -> None:
        """Raises CommandError with the first port in use and its process. `valkey`: whether Valkey's port is needed."""
        metrics = (*self.router_metrics, self.cache_metrics, *self.worker_metrics, self.console_metrics)
        others = (*self.workers, *metrics, self.pages, self.spans, self.ledger, self.ledger_metrics)
        for port in (self.router, self.cache, *((self.valkey,) if valkey else ()), *others):
            if _is_taken(port):
                raise CommandError(f"port {port} is taken{_owner(port)}; choose another with --port")


def address(port: int) -> str:
    """Returns host:port on the loopback address."""
    return f"{HOST}:{port}"


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        # With SO_REUSEADDR, as servers use it, closed connections in TIME_WAIT do not occupy the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return True
    return False


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
