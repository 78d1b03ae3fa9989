"""`ringmesh trace`: shows the spans that services wrote to a folder, as trees."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from services.cli.commands import tables
from services.cli.errors import CommandError
from services.runtime.telemetry.span_tree import SpanTree, StoredSpan, trees

_LATEST = 20
_BAR_CELLS = 24
_KEPT_FILES = 64
# Processes write a span at most this long after its end.
_TRANSIT_SECONDS = 2.0
_PERIOD_SECONDS = 0.25


def find(folder: Path, prefix: str, sleep: Callable[[float], None] = time.sleep) -> SpanTree:
    """Returns the trace whose id starts with `prefix`. Waits for spans that processes may not have written yet.

    Raises CommandError if there is no such trace, or more than one.
    """
    prefix = prefix.lower()
    found = trees(_read(folder, prefix))
    for _ in range(round(_TRANSIT_SECONDS / _PERIOD_SECONDS)):
        if any(time.time_ns() - trace.end_ns > _TRANSIT_SECONDS * 1e9 for trace in found):
            break
        sleep(_PERIOD_SECONDS)
        found = trees(_read(folder, prefix))
    if not found:
        raise CommandError(f"no trace {prefix} in {folder}; only sampled requests have traces")
    if len(found) > 1:
        some = ", ".join(sorted(trace.trace_id for trace in found)[:3])
        raise CommandError(f"{len(found)} traces begin with {prefix}: {some}{', ...' if len(found) > 3 else ''}")
    return found[0]


def latest(folder: Path) -> list[SpanTree]:
    return sorted(trees(_read(folder, "")), key=lambda trace: trace.start_ns, reverse=True)[:_LATEST]


def prune(folder: Path) -> None:
    """Deletes the oldest span files, because every process leaves one behind."""
    files = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[_KEPT_FILES:]:
        path.unlink(missing_ok=True)


def tree(trace: SpanTree) -> Table:
    table = tables.create("span", "service", ">at ms", ">took ms", "", title=f"trace {trace.trace_id}")
    table.columns[-1].width = _BAR_CELLS
    table.add_column("attributes", overflow="fold")
    for guide, (_, span) in zip(_guides([depth for depth, _ in trace.rows]), trace.rows, strict=True):
        table.add_row(
            f"[dim]{guide}[/]{escape(span.short_name)}",
            escape(span.service.removeprefix("ringmesh-")),
            _ms(span.start_ns - trace.start_ns),
            _ms(span.end_ns - span.start_ns),
            f"[{'red' if span.error else 'cyan'}]{_bar(span, trace)}[/]",
            escape(_details(span)),
            style="red" if span.error else "",
        )
    return table


def listing(traces: Iterable[SpanTree]) -> Table:
    table = tables.create("trace id", "began", ">took ms", ">spans", "of", "answer from", "worker", "tenant", "error")
    # The trace id is never shortened, so that it can be copied.
    table.columns[0].min_width = 32
    # The error gets the remaining width; otherwise a long one would take the space of the others.
    table.expand, table.columns[-1].ratio = True, 1
    for trace in traces:
        root = trace.rows[0][1]
        attributes = root.attributes
        began = datetime.fromtimestamp(trace.start_ns / 1e9).strftime("%H:%M:%S")
        error = root.error or next((span.error for _, span in trace.rows if span.error), "")
        model, version, outcome, worker, tenant = (
            attributes.get(f"ringmesh.{name}", "")
            for name in ("model.name", "model.version", "cache.outcome", "worker.id", "tenant")
        )
        cells = (f"{model} {version}".strip() or root.short_name, outcome, worker, tenant, error)
        table.add_row(
            trace.trace_id,
            began,
            _ms(trace.duration_ns),
            str(len(trace.rows)),
            *(escape(str(cell)) for cell in cells),
            style="red" if error else "",
        )
    return table


def _read(folder: Path, prefix: str) -> Iterator[StoredSpan]:
    mark = f'"trace_id":"{prefix}'
    for path in folder.glob("*.jsonl"):
        with path.open(errors="replace") as file:
            for line in file:
                # Parsing dominates the time, and most lines belong to other traces.
                if mark in line and (span := _parse(line)) is not None:
                    yield span


def _parse(line: str) -> StoredSpan | None:
    """Parses a span; returns None if the line is incomplete, as the last line of a killed process can be."""
    try:
        return StoredSpan(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _guides(depths: list[int]) -> list[str]:
    """Returns the tree lines in front of each name. A row has a line downwards if a later sibling follows."""
    guides: list[str] = []
    open_levels: set[int] = set()
    for depth in reversed(depths):
        last = depth not in open_levels
        open_levels = {level for level in open_levels if level <= depth} | {depth}
        parts = ["│  " if level in open_levels else "   " for level in range(1, depth)]
        guides.append("".join(parts) + (("└─ " if last else "├─ ") if depth else ""))
    return guides[::-1]


def _bar(span: StoredSpan, trace: SpanTree) -> str:
    total = max(1, trace.duration_ns)
    start = min(_BAR_CELLS - 1, (span.start_ns - trace.start_ns) * _BAR_CELLS // total)
    cells = max(1, round((span.end_ns - span.start_ns) * _BAR_CELLS / total))
    return " " * start + "█" * min(cells, _BAR_CELLS - start)


def _ms(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.2f}"


def _details(span: StoredSpan) -> str:
    """Returns the error, followed by the non-empty attributes."""
    attributes = (f"{key.removeprefix('ringmesh.')}={value}" for key, value in span.attributes.items() if value != "")
    return " ".join(part for part in (span.error, *attributes) if part)
