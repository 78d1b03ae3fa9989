"""The first page: findings, the ring and its workers, and the state of each process."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringmesh.router.v1 import router_pb2
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.history import History, Line
from services.console.data.overview import LOOP_LAG, NOW_SECONDS, STAGE, Vitals
from services.console.data.sources import Sources
from services.console.pages.chart import Slice, plot, ring
from services.console.pages.live import Context

_BUSY = 16.0
_EVENTS = 12


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker in the ring, with values from its own metrics. Rates are per second, times in seconds."""

    worker: router_pb2.Worker
    rate: float
    compute: float
    queued: float


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process and its resource use. `problem`: why it has no metrics; "" if it has."""

    name: str
    address: str
    version: str
    cpu: float
    memory: float
    files: float
    lag: float
    problem: str


async def contents(sources: Sources, _: Request) -> Context:
    """Returns the context of `fleet.html`."""
    view, history = sources.view, sources.history
    found = sources.findings()
    vitals = overview.vitals(history)
    workers = worker_rows(sources)
    slices = [
        Slice(row.worker.id or row.worker.address, row.worker.share, row.worker.in_flight / _BUSY, row.worker.healthy)
        for row in workers
    ]
    healthy = sum(row.worker.healthy for row in workers)
    return {
        "findings": found,
        "headline": headline(sources, vitals),
        "vitals": vitals,
        "charts": charts(history),
        "ring": ring(slices, f"{healthy}/{len(workers)}", "workers serve"),
        "workers": workers,
        "regions": regions(workers),
        "view": view,
        "events": sources.fleet.events(_EVENTS),
        "processes": process_rows(sources),
        "refused": history.refused(),
    }


def headline(sources: Sources, vitals: Vitals) -> str:
    """Returns the state of the fleet in one or two sentences."""
    view = sources.view
    if all(router.problem == "not asked yet" for router in view.routers):
        return "Asking the routers…"
    if view.router is None:
        return "No router answers. Callers cannot be served, or the console cannot reach them."
    workers = view.workers.values()
    healthy = sum(worker.healthy for worker in workers)
    who = f"{healthy} of {len(workers)} workers serve"
    if math.isnan(vitals.requests) or vitals.requests == 0:
        return f"{who}. Nobody has asked for anything in the last minute."
    cached = "" if math.isnan(vitals.hit_ratio) else f", {units.percent(vitals.hit_ratio)} of them from the cache"
    return f"{who} {units.number(vitals.requests)} requests a second{cached}."


def charts(history: History, **where: str) -> list[Any]:
    """Returns the four charts at the top of every page about requests."""
    return [
        plot(
            "Requests a second",
            [Line("all", overview.requests(history, **where)), Line("failed", overview.errors(history, **where))],
            units.number,
        ),
        plot(
            "Time to answer",
            overview.latency(history, **where),
            units.seconds,
        ),
        plot("From the cache", [Line("hit ratio", overview.hit_ratio(history, **where))], units.percent, least=1.0),
        plot("Compute saved, a second", [Line("saved", overview.saved(history, **where))], units.seconds),
    ]


def worker_rows(sources: Sources) -> list[WorkerRow]:
    """Returns the workers, sorted by name."""
    history = sources.history
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, ("target",))
    total = history.increase(f"{STAGE}_sum", NOW_SECONDS, ("target",), stage="compute")
    count = history.increase(f"{STAGE}_count", NOW_SECONDS, ("target",), stage="compute")
    queued = history.last("ringmesh_worker_queue_depth", ("target",))
    rows = []
    for worker in sorted(sources.view.workers.values(), key=_by_name):
        key = (worker.id,)
        runs = count.get(key, 0.0)
        rows.append(
            WorkerRow(
                worker,
                rate.get(key, math.nan),
                total[key] / runs if runs else math.nan,
                queued.get(key, math.nan),
            )
        )
    return rows


def _by_name(worker: router_pb2.Worker) -> tuple[list[str | int], str]:
    """Returns a natural sort key: worker-2 comes before worker-10."""
    parts = re.split(r"(\d+)", worker.id)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], worker.address


def regions(rows: list[WorkerRow]) -> Mapping[str, list[WorkerRow]]:
    """Returns workers by region; empty if no worker reports a region."""
    by_region: dict[str, list[WorkerRow]] = {}
    for row in rows:
        by_region.setdefault(row.worker.region, []).append(row)
    return by_region if set(by_region) - {""} else {}


def process_rows(sources: Sources) -> list[ProcessRow]:
    """Returns the processes in the order of the settings."""
    history = sources.history
    by = ("target",)
    cpu = history.rate("ringmesh_process_cpu_seconds_total", NOW_SECONDS, by)
    memory = history.last("ringmesh_process_resident_memory_bytes", by)
    files = history.last("ringmesh_process_open_files", by)
    lag = history.quantile(0.99, LOOP_LAG, NOW_SECONDS, by)
    versions = {labels[0]: labels[1] for labels in history.last("ringmesh_build_info", ("target", "version"))}
    rows = []
    for name, address in sources.scraper.targets.items():
        key = (name,)
        rows.append(
            ProcessRow(
                name,
                address,
                versions.get(name, ""),
                cpu.get(key, math.nan),
                memory.get(key, math.nan),
                files.get(key, math.nan),
                lag.get(key, math.nan),
                sources.scraper.problems.get(name, ""),
            )
        )
    return rows
