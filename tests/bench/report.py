"""Results as a table on the screen, as docs/benchmarks.md, and as plots."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from tests.bench.results import (
    BARE,
    BATCHES,
    CONFIDENCE,
    ECHO,
    IN_PROCESS,
    TRITON,
    UP,
    Figure,
    Results,
    Row,
    Spread,
    differences,
)

COLUMNS = ("", "outstanding", "req/s", "spread", "by Triton's", "p50 ms", "p99 ms", "p99.9 ms", "CPU µs", "peak MB")
GOALS = ("figure", "ratio", "required", "goal", "")
_COLOURS = ("#1f6feb", "#57ab5a", "#d29922", "#8b949e", "#986ee2")

_INTRODUCTION = f"""# Benchmarks

Written by `python -m tests.bench --write`; do not edit. Closed loop, all peers in turn in each round, medians over the
rounds. Ratios are taken within each round; in brackets the lowest and the highest. The load generator runs on the same
cores and is not counted in CPU, which is that of all processes of a peer, for each call. Models, `config.pbtxt` (two
instances, dynamic batching, a response cache) and bodies are the same for all.

- {UP}: what people start: one router, two workers, Valkey, the cache service and the console that scrapes all of them,
  1 % of the requests traced and written; defaults throughout, compiled, with tcmalloc.
- {BARE}: one router and one worker without Redis and console, 1 % traced and written, one thread in each of a model's
  two instances; compiled, with tcmalloc.
- {TRITON}: the C++ server with its python backend, which calls ONNX Runtime in two processes with one thread each, and
  its local response cache of the same size as ours; with the malloc of the C library
  ([performance](performance.md) says what tcmalloc would give it).
- {ECHO}: a floor, the same gRPC engine, which answers as many bytes and does nothing else; for misses two of them, with
  the router's way to a worker between.
- {IN_PROCESS}: a floor, called in this process by a thread for each core, without a network; {BATCHES}: the same, with
  what is outstanding as batches of up to 64.

Ringmesh runs with `RINGMESH_QUEUE_SECONDS=30`, so that nothing is turned away. 1,024 calls are outstanding on 200
connections, fewer on four. Peers stay up while others are measured; the idle `ringmesh up` takes about 8 % of a core
then. Peak memory counts pages that processes share in each of them. A GPU was not used: see
[models](models.md#execution). `make bench-check` compares two revisions, see [CONTRIBUTING](../CONTRIBUTING.md).
"""


def cells(results: Results, row: Row) -> tuple[str, ...]:
    """Returns the cells of COLUMNS; values that a peer lacks are empty."""
    rates = [run.rps for run in row.runs]
    ratios = results.ratios("rps", row.workload.name, row.outstanding, row.peer, TRITON)

    def number(what: str, form: str, by: float = 1) -> str:
        value = row.median(what) / by
        return f"{value:{form}}" if value else ""

    return (
        row.peer, f"{row.outstanding:,}", f"{row.median('rps'):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}",
        str(Spread.of(ratios)) if ratios and row.peer != TRITON else "",
        number("p50", ".2f"), number("p99", ".2f"), number("p999", ".2f"), number("cpu_us", ".0f"),
        number("peak_bytes", ".0f", 2**20),
    )  # fmt: skip


def goal_cells(figure: Figure) -> tuple[str, ...]:
    """Returns the cells of GOALS."""
    bound = "at most" if figure.at_most else "at least"
    goal = "" if figure.goal is None else f"{figure.goal:g}"
    return figure.name, str(figure.ratio), f"{bound} {figure.required:g}", goal, figure.verdict


def show(console: Console, results: Results, figures: Iterable[Figure]) -> None:
    """Prints the results."""
    for workload, rows in groupby(results, key=lambda row: row.workload):
        table = Table(*COLUMNS, title=workload.title, title_justify="left", title_style="bold")
        for _, level in groupby(rows, key=lambda row: row.outstanding):
            for row in level:
                table.add_row(*cells(results, row))
            table.add_section()
        console.print(table)
    table = Table(*GOALS, title=f"goals of {UP}")
    for figure in figures:
        table.add_row(*goal_cells(figure), style="red" if figure.verdict == "missed" else "")
    if table.row_count:
        console.print(table)


def show_differences(console: Console, revision: str, results: Results) -> None:
    """Prints the differences between this tree and `revision`."""
    table = Table("", "outstanding", "rounds", "req/s", "CPU", "", title=f"{UP}: this tree by {revision}")
    for found in differences(results):
        table.add_row(
            found.workload, str(found.outstanding), str(found.rounds), str(found.rps), str(found.cpu), found.verdict
        )
    console.print(table)
    console.print(f"Median of the ratios of each round; in brackets the interval of {CONFIDENCE:.0%} (bootstrap).")


def write(docs: Path, machine: str, how: str, results: Results, figures: Iterable[Figure]) -> None:
    """Writes docs/benchmarks.md and its plots; the plots of an earlier run are removed."""
    images = docs / "images"
    images.mkdir(exist_ok=True)
    for old in images.glob("bench-*.svg"):
        old.unlink()
    lines = [
        _INTRODUCTION,
        f"{machine}. {how}.",
        "",
        f"## Goals of {UP}",
        "",
        *_markdown(GOALS, map(goal_cells, figures)),
    ]
    for workload, rows in groupby(results, key=lambda row: row.workload):
        rows = list(rows)
        image = f"bench-{workload.name}.svg"
        (images / image).write_text(plot(workload.title, rows))
        title = f"{workload.title[0].upper()}{workload.title[1:]}"
        lines += ["", f"## {title}", "", f"![{workload.title}](images/{image})", ""]
        lines += _markdown(COLUMNS, (cells(results, row) for row in rows))
        if executions := [row for row in rows if row.executions]:
            said = ", ".join(f"{row.peer} {max(row.executions):.3f}" for row in executions)
            lines += ["", f"Executions for each distinct key, the worst run: {said}."]
    (docs / "benchmarks.md").write_text("\n".join(lines) + "\n")


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a table whose first column is text and whose other columns are numbers."""
    form = "| --- |" + " ---: |" * (len(columns) - 1)
    return [f"| {' | '.join(columns)} |", form, *(f"| {' | '.join(row)} |" for row in rows)]


def plot(title: str, rows: list[Row]) -> str:
    """Returns an SVG: for each number of outstanding calls a bar for each peer; requests a second, then p99 latency."""
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
        most = max(row.median(what) for row in rows)
        y = 28
        for _, level in groupby(rows, key=lambda row: row.outstanding):
            for row in level:
                value = row.median(what)
                width = value / most * (panel - 70)
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
