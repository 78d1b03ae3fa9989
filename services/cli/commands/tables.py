"""Tables of the commands' output, without lines."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.table import Table

# Characters of a name: tenants choose theirs, of up to 256.
WIDEST_NAME = 40


def create(*columns: str, title: str | None = None, gap: int = 2, widest: int | None = None) -> Table:
    """Returns a table with one-line cells. A column whose name begins with ">" is aligned to the right.

    `widest`: characters of a cell, unless it is a number; the end of longer text, such as a tenant's name, is left out.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for name in columns:
        if name.startswith(">"):
            table.add_column(name.removeprefix(">"), justify="right", no_wrap=True)
        else:
            table.add_column(name, no_wrap=True, max_width=widest)
    return table


def utc(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M}"
