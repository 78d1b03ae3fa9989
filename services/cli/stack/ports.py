"""Which ports a stack takes, and whether they are free."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass

import psutil

from services.cli.errors import CommandError

HOST = "127.0.0.1"
# Offsets from the router's port, so that one option moves a whole stack: 8001, 8010, 8011, 8100, 8101, ...
_CACHE, _VALKEY, _WORKERS = 9, 10, 99
# Of metrics: 8002 (and up to 8009 where routers share a port), 8012, 8200, 8201, ...
_ROUTER_METRICS, _CACHE_METRICS, _WORKER_METRICS = 1, 11, 199
# Of the console: 8080 for browsers, 8013 for spans, 8014 for metrics. Of the ledger: 8015, 8016 for metrics.
_PAGES, _SPANS, _CONSOLE_METRICS = 79, 12, 13
_LEDGER, _LEDGER_METRICS = 14, 15
# Below what systems hand out for outgoing connections, which could take a port between our look and its use.
_FREE_RANGE = range(15000, 32000)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one stack, all on the loopback address. Routers share theirs; `router_metrics` has one of each."""

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
        """The router on `port` and the rest behind it. Raises CommandError where they do not fit."""
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
        """Ports that nobody listens on now."""
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
        """Raises CommandError that names the first port taken, and by whom. `valkey`: whether its port is needed."""
        metrics = (
            *self.router_metrics,
            self.cache_metrics,
            *self.worker_metrics,
            self.console_metrics,
            self.ledger_metrics,
        )
        others = (*self.workers, *metrics, self.pages, self.spans, self.ledger)
        for port in (self.router, self.cache, *((self.valkey,) if valkey else ()), *others):
            if _is_taken(port):
                raise CommandError(f"port {port} is taken{_owner(port)}; choose another with --port")


def address(port: int) -> str:
    """host:port on the loopback address."""
    return f"{HOST}:{port}"


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: what is left of closed connections does not take the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return True
    return False


def _owner(port: int) -> str:
    """Told where the system lets us see it; other users' processes may be hidden."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
