"""Tables of the commands' output, without lines."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.table import Table


def create(*columns: str, title: str | None = None, gap: int = 2) -> Table:
    """Returns a table with one-line cells. A column whose name begins with ">" is aligned to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def utc(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M}"
