"""The first page: findings, the ring and its workers, and the state of each process."""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

from ringmesh.router.v1 import router_pb2
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.fleet_watch import PENDING
from services.console.data.overview import LOOP_LAG, NOW_SECONDS, STAGE, Vitals
from services.console.data.sources import Sources
from services.console.pages import request_charts
from services.console.pages.chart import RingSlice, ring
from services.console.pages.live import Context
from services.console.pages.request_charts import ChartOptions

Row: TypeAlias = dict[str, Any]

_BUSY = 16.0
_EVENTS = 12


async def contents(sources: Sources, request: Request) -> Context:
    view, history = sources.view, sources.history
    options = ChartOptions(request, "model", "worker")
    vitals = overview.vitals(history)
    workers = worker_rows(sources)
    members = [row["worker"] for row in workers]
    slices = [
        RingSlice(worker.id or worker.address, worker.share, worker.in_flight / _BUSY, worker.healthy)
        for worker in members
    ]
    healthy = sum(worker.healthy for worker in members)
    return {
        "findings": sources.findings(),
        "headline": headline(sources, vitals),
        "vitals": vitals,
        "charts": request_charts.charts(history, options),
        "switches": options.switches,
        "ring": ring(slices, f"{healthy}/{len(workers)}", "workers serve"),
        "workers": workers,
        "regions": any(worker.region for worker in members),
        "view": view,
        "events": sources.fleet.events.newest(_EVENTS),
        "processes": process_rows(sources),
        "refused": history.refused(),
    }


def headline(sources: Sources, vitals: Vitals) -> str:
    view = sources.view
    if all(router.problem == PENDING for router in view.routers):
        return "Connecting to the routers…"
    if view.router is None:
        return "No router answers. Callers cannot be served, or the console cannot reach them."
    workers = view.workers.values()
    healthy = sum(worker.healthy for worker in workers)
    who = f"{healthy} of {len(workers)} workers serve"
    if math.isnan(vitals.requests) or vitals.requests == 0:
        return f"{who}. No requests in the last minute."
    cached = "" if math.isnan(vitals.hit_ratio) else f", {units.percent(vitals.hit_ratio)} of them from the cache"
    return f"{who} {units.number(vitals.requests)} requests a second{cached}."


def worker_rows(sources: Sources) -> list[Row]:
    """Returns the workers, sorted by name, with values of the last minute. Rates are per second, times in seconds."""
    history, by = sources.history, ("target",)
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, by)
    compute = overview.means(history, STAGE, NOW_SECONDS, by, stage="compute")
    queued = history.last("ringmesh_worker_queue_depth", by)
    return [
        {
            "worker": worker,
            "rate": rate[worker.id,],
            "compute": compute[worker.id,],
            "queued": queued[worker.id,],
        }
        for worker in sorted(sources.view.workers.values(), key=_by_name)
    ]


def _by_name(worker: router_pb2.Worker) -> tuple[list[str | int], str]:
    """Returns a natural sort key: worker-2 comes before worker-10."""
    parts = re.split(r"(\d+)", worker.id)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], worker.address


def process_rows(sources: Sources) -> list[Row]:
    """Returns the processes in the order of the settings. `problem`: why there are no metrics; "" if there are."""
    history, by = sources.history, ("target",)
    cpu = history.rate("ringmesh_process_cpu_seconds_total", NOW_SECONDS, by)
    memory = history.last("ringmesh_process_resident_memory_bytes", by)
    files = history.last("ringmesh_process_open_files", by)
    lag = history.quantile(0.99, LOOP_LAG, NOW_SECONDS, by)
    versions = {labels[0]: labels[1] for labels in history.last("ringmesh_build_info", ("target", "version"))}
    return [
        {
            "name": name,
            "address": address,
            "version": versions.get(name, ""),
            "cpu": cpu[name,],
            "memory": memory[name,],
            "files": files[name,],
            "lag": lag[name,],
            "problem": sources.scraper.problems.get(name, ""),
        }
        for name, address in sources.scraper.targets.items()
    ]
