"""Output of `ringmesh up`: progress, endpoints, first calls."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from services.cli.commands import shell, tables
from services.cli.commands.sample_request import SampleRequest
from services.cli.stack.stack import StackOptions
from services.runtime import w3c
from services.runtime.rpc.tls import TlsFiles


class Screen:
    """Prints messages for an operator."""

    def __init__(self, console: Console, state: Path) -> None:
        """`state`: the folder in which `ringmesh trace` finds the traces."""
        self._console = console
        self._state = state

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def endpoints(self, options: StackOptions) -> None:
        table = tables.create("process", "endpoint", "protocol", gap=3)
        endpoints = options.endpoints
        count = len(endpoints.routers)
        table.add_row(
            "router" if count == 1 else f"{count} routers",
            endpoints.router,
            f"gRPC{' with TLS' if options.tls else ''}, inference v2: send requests here",
            style="bold",
        )
        for number, endpoint in enumerate(endpoints.workers):
            table.add_row(f"worker-{number}", endpoint, "gRPC, for routers")
        table.add_row("cache", endpoints.cache, "gRPC, ringmesh.cache.v1")
        redis = urlsplit(options.redis_url)
        shown = redis.netloc.rpartition("@")[2] or redis.path  # without user and password
        table.add_row("valkey" if options.redis is None else "redis", shown, "Redis protocol")
        table.add_row("ledger", endpoints.ledger, "gRPC, ringmesh.ledger.v1")
        table.add_row(
            "console", options.console, f"HTTP{'S' if options.tls else ''}: open it in a browser", style="bold"
        )
        table.add_row("metrics", f"http://{endpoints.metrics[endpoints.routers[0]]}/metrics", "Prometheus")
        self._console.print()
        self._console.print(table)

    def first_calls(self, router: str, sample: SampleRequest, tls: TlsFiles | None, *, has_keys: bool) -> None:
        """Prints commands for a first request and its trace verbatim, so that they can be copied."""
        if has_keys:
            self.say(
                "callers need a key in RINGMESH_API_KEY; grpcurl one with the role operate, which reflection needs"
            )
        trace_id = w3c.new_trace_id()
        traceparent = f"traceparent: {w3c.traceparent(trace_id, w3c.new_span_id(), sampled=True)}"
        for title, command in (
            ("grpcurl", sample.grpcurl(router, traceparent, tls, has_keys=has_keys)),
            ("its trace", shell.trace(trace_id, self._state)),
            ("tritonclient", sample.python(router, tls, has_keys=has_keys)),
        ):
            self._console.print(f"\n[bold]{title}[/]")
            self.say(command)
        self._console.print()
