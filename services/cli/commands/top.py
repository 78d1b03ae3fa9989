"""`ringmesh top`: shows the content of the console's first page in a terminal."""

from __future__ import annotations

import json
import os
import ssl
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from services.cli.commands import tables
from services.cli.errors import CommandError

_PERIOD_SECONDS = 2.0
_TIMEOUT = 5.0
# Maximum rows per table, so that the next table is visible too.
_MOST_ROWS = 15
_LONGEST_FINDING = 320
_TRUST = ssl.create_default_context()
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_TRUST))
_STYLES = {"critical": "bold red", "warning": "yellow", "note": "cyan"}


def trust(ca: Path) -> None:
    """Accepts certificates of the CAs in a PEM file too, if there is one. Raises CommandError."""
    try:
        if ca.exists():
            _TRUST.load_verify_locations(ca)
    except OSError as error:
        raise CommandError(f"{ca} has no certificates: {error}") from None


def read(url: str) -> dict[str, Any]:
    """Reads the summary from the console at `url`. Raises CommandError if the console does not answer."""
    if key := os.environ.get("RINGMESH_API_KEY"):
        _OPENER.addheaders = [("Authorization", f"Bearer {key}")]
    try:
        with _OPENER.open(f"{url.rstrip('/')}/api/summary", timeout=_TIMEOUT) as answer:
            summary: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise CommandError(
            f"the console at {url} answered {error.code}: {error.read().decode(errors='replace')[:200]}"
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"no console answers at {url}: {error}; `ringmesh up` starts one") from None
    return summary


def once(console: Console, url: str) -> None:
    console.print(frame(read(url)))


def watch(console: Console, url: str) -> None:
    """Shows a new frame every two seconds, until Ctrl-C. If the console stops answering, says so and retries."""
    shown: RenderableType = frame(read(url))
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(shown, refresh=True)
                time.sleep(_PERIOD_SECONDS)
                try:
                    shown = frame(read(url))
                except CommandError as error:
                    shown = Text(f"{error}\n\nTrying again; Ctrl-C ends.", style="red")
        except KeyboardInterrupt:
            return


def frame(summary: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [Text(summary["headline"], style="bold"), ""]
    for finding in summary["findings"]:
        style = _STYLES.get(finding["severity"], "")
        parts.append(
            Text.assemble(
                (f"{finding['severity']:<9}", style),
                textwrap.shorten(
                    f"{finding['title']}: {finding['where']}. {finding['detail']}", _LONGEST_FINDING, placeholder=" …"
                ),
            )
        )
    if not summary["findings"]:
        parts.append(Text("nothing needs attention", style="green"))
    vitals = summary["vitals"]
    parts += ["", _row({_heading(name): value for name, value in vitals.items()}), ""]
    for title in ("workers", "models", "processes"):
        if rows := summary[title]:
            parts.append(_table(title, rows[:_MOST_ROWS]))
            if len(rows) > _MOST_ROWS:
                parts.append(Text(f"and {len(rows) - _MOST_ROWS} more", style="dim"))
            parts.append("")
    return Group(*parts)


def _heading(name: str) -> str:
    """Returns the column heading of a field; the suffix `_s`, as in `requests_s`, marks a rate."""
    return name.removesuffix("_s").replace("_", " ") + ("/s" if name.endswith("_s") else "")


def _row(values: dict[str, str]) -> Table:
    table = tables.create(*(f">{name}" for name in values), gap=3)
    table.add_row(*(f"[bold]{escape(value)}[/]" for value in values.values()))
    return table


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    names = [_heading(name) for name in rows[0]]
    table = tables.create(*names[:2], *(f">{name}" for name in names[2:]), title=title)
    for row in rows:
        table.add_row(*(escape(value) for value in row.values()))
    return table
