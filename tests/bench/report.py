"""Results as a table on the screen, as docs/benchmarks.md, and as plots."""

import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from tests.bench.results import RINGMESH, Figure, Results, Row

COLUMNS = ("", "outstanding", "req/s", "spread", "p50 ms", "p99 ms", "p99.9 ms", "CPU µs", "peak MB", "Ringmesh by it")
_COLOURS = ("#1f6feb", "#d29922", "#8b949e", "#57ab5a", "#986ee2", "#e5534b", "#39c5cf")

_INTRODUCTION = """# Benchmarks

Written by `python -m tests.bench --write`; do not edit. Closed loop, peers in turn, medians; spread is the lowest and
the highest run. The load generator runs on the same cores and is not counted in CPU, which is that of the servers a
call. Ringmesh is a router and a worker with their defaults (1 % traced and written to a folder, metrics on, no Redis)
but for `RINGMESH_QUEUE_SECONDS`, so that nothing is turned away, and one thread in each of a model's two instances.
Triton is the C++ server with its python backend, which calls ONNX Runtime in two processes with one thread each,
dynamic batching, and its local response cache of the same size as ours. Models, `config.pbtxt` and bodies are the
same. Floors: `echo` answers as many bytes and does nothing else, low-level without asyncio; ONNX Runtime is called in
process, by a thread a core, and pays for no network. Peak memory counts pages that processes share in each of them.
Each runs as its installation has it: Ringmesh compiled and with tcmalloc, the others with the malloc of the C library;
[performance](performance.md) says what tcmalloc would give them.
"""


def cells(results: Results, row: Row) -> tuple[str, ...]:
    """As in COLUMNS; what a peer cannot say is left out."""
    ratio = results.ratio("rps", row.workload.name, row.outstanding, row.peer)
    rates = [run.rps for run in row.runs]

    def number(what: str, form: str, by: float = 1) -> str:
        value = row.median(what) / by
        return "" if math.isnan(value) or not value else f"{value:{form}}"

    return (
        row.peer, str(row.outstanding), f"{row.median('rps'):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}",
        number("p50", ".2f"), number("p99", ".2f"), number("p999", ".2f"), number("cpu_us", ".0f"),
        number("peak_bytes", ".0f", 2**20), f"{ratio:.2f}" if ratio and row.peer != RINGMESH else "",
    )  # fmt: skip


def show(console: Console, results: Results, figures: Iterable[Figure]) -> None:
    """On the screen."""
    for workload, rows in groupby(results, key=lambda row: row.workload):
        table = Table(*COLUMNS, title=workload.title, title_justify="left", title_style="bold")
        for _, level in groupby(rows, key=lambda row: row.outstanding):
            for row in level:
                table.add_row(*cells(results, row))
            table.add_section()
        console.print(table)
    table = Table("figure", "ratio", "goal", "")
    for figure in figures:
        goal = f"{'at most' if figure.at_most else 'at least'} {figure.bound:g}"
        table.add_row(figure.name, f"{figure.ratio:.2f}", goal, "reached" if figure.reached else "[red]missed")
    if table.row_count:
        console.print(table)


def write(docs: Path, machine: str, how: str, results: Results, figures: Iterable[Figure]) -> None:
    """docs/benchmarks.md and its plots."""
    images = docs / "images"
    images.mkdir(exist_ok=True)
    lines = [
        _INTRODUCTION,
        f"{machine}. {how}.",
        "",
        "## Goals",
        "",
        "| figure | ratio | goal | |",
        "| --- | --- | --- | --- |",
    ]
    for figure in figures:
        goal = f"{'at most' if figure.at_most else 'at least'} {figure.bound:g}"
        lines.append(f"| {figure.name} | {figure.ratio:.2f} | {goal} | {'reached' if figure.reached else 'missed'} |")
    for workload, rows in groupby(results, key=lambda row: row.workload):
        rows = list(rows)
        image = f"bench-{workload.name}.svg"
        (images / image).write_text(plot(workload.title, rows))
        lines += [
            "",
            f"## {workload.title[0].upper()}{workload.title[1:]}",
            "",
            f"![{workload.title}](images/{image})",
            "",
        ]
        lines.append(f"| {' | '.join(COLUMNS)} |")
        lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
        lines += [f"| {' | '.join(cells(results, row))} |" for row in rows]
        if executions := [row for row in rows if row.executions]:
            said = ", ".join(f"{row.peer} {max(row.executions):.3f}" for row in executions)
            lines += ["", f"Executions for each distinct key, the worst run: {said}."]
    (docs / "benchmarks.md").write_text("\n".join(lines) + "\n")


def plot(title: str, rows: list[Row]) -> str:
    """SVG: for each number of outstanding calls a bar for each peer; requests a second, then p99 latency."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    colours = dict(zip(peers, _COLOURS, strict=False))
    bar, gap, left, panel = 15, 14, 190, 330
    height = 40 + sum(bar * len(list(level)) + gap for _, level in groupby(rows, key=lambda row: row.outstanding))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 2 * panel + 20}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for at, what, name in ((left, "rps", "requests/s"), (left + panel, "p99", "p99, ms")):
        parts.append(f'<text x="{at}" y="16" font-weight="bold">{escape(title)}: {name}</text>' if what == "rps"
                     else f'<text x="{at}" y="16" font-weight="bold">{name}</text>')  # fmt: skip
        most = max(value for row in rows if not math.isnan(value := row.median(what)))
        y = 28
        for _, level in groupby(rows, key=lambda row: row.outstanding):
            for row in level:
                value = row.median(what)
                width = 0 if math.isnan(value) else value / most * (panel - 70)
                if what == "rps":
                    label = escape(f"{row.peer}, {row.outstanding}")
                    parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{label}</text>')
                parts.append(
                    f'<rect x="{at}" y="{y}" width="{width:.0f}" height="{bar - 2}" fill="{colours[row.peer]}"/>'
                )
                number = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
                parts.append(f'<text x="{at + width + 4:.0f}" y="{y + 11}">{number}</text>')
                y += bar
            y += gap
    return "\n".join([*parts, "</svg>", ""])
