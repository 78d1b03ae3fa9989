"""Output of `ringmesh up`: progress, endpoints, first calls."""

from __future__ import annotations

from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.cli.commands.first_calls import FirstCalls
from services.cli.stack.stack import StackOptions


class Screen:
    """Prints messages for an operator. Implements the stack's Reporter."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def started(self, name: str, endpoint: str, seconds: float) -> None:
        """Prints that a process is ready."""
        self._console.print(f"  [green]✓[/] {name:<10} {endpoint:<21} {seconds:5.1f} s", highlight=False)

    def say(self, line: str) -> None:
        """Prints one line without wrapping."""
        self._console.print(Text(line), soft_wrap=True)

    def endpoints(self, options: StackOptions) -> None:
        """Prints the endpoint and the protocol of each process."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for column in ("process", "endpoint", "speaks"):
            table.add_column(column, no_wrap=True)
        count = len(options.routers)
        table.add_row(
            "router" if count == 1 else f"{count} routers",
            options.router,
            "inference v2: send requests here",
            style="bold",
        )
        for number, endpoint in enumerate(options.workers):
            table.add_row(f"worker-{number}", endpoint, "inference v2, envelopes")
        table.add_row("cache", options.cache, "ringmesh.cache.v1")
        redis = urlsplit(options.redis_url)
        shown = redis.netloc.rpartition("@")[2] or redis.path  # without user and password
        table.add_row("valkey" if options.redis is None else "redis", shown, "Redis protocol")
        table.add_row("ledger", options.ledger, "ringmesh.ledger.v1")
        table.add_row("console", options.console, "open it in a browser", style="bold")
        table.add_row("metrics", f"http://{next(iter(options.routers.values()))}/metrics", "Prometheus text")
        self._console.print()
        self._console.print(table)

    def first_calls(self, calls: FirstCalls) -> None:
        """Prints the first calls verbatim, so that they can be copied."""
        parts = [("grpcurl", calls.grpcurl), ("its trace", calls.trace), ("tritonclient", calls.tritonclient)]
        for title, command in parts:
            if command:
                self._console.print(f"\n[bold]{title}[/]")
                self.say(command)
        self._console.print()
