"""The page of one worker: its state, its models, and its use of CPU, GPU and memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import overview, units
from services.console.data.history import Floats, History
from services.console.data.overview import NOW_SECONDS, STAGE
from services.console.data.sources import Sources
from services.console.pages import fleet_page
from services.console.pages.chart import plot
from services.console.pages.fleet_page import Row
from services.console.pages.live import Context
from services.console.pages.request_charts import ChartOptions

_GPU = ("use_ratio", "memory_used_bytes", "memory_total_bytes", "temperature_celsius", "power_watts")


async def contents(sources: Sources, request: Request) -> Context:
    """Returns the context of `worker.html`. Raises HTTPException 404 if no router knows the worker."""
    name = request.path_params["name"]
    rows = [row for row in fleet_page.worker_rows(sources) if name in (row["worker"].id, row["worker"].address)]
    if not rows:
        raise HTTPException(404, f"No router knows a worker {name!r}.")
    history, options, row = sources.history, ChartOptions(request), rows[0]
    edges, target = options.edges(history), row["worker"].id
    by = ("gpu",)

    def runs(result: str) -> Floats | None:
        return history.rates("ringmesh_worker_requests_total", edges, target=target, result=result).get(())

    def gauges(name: str) -> dict[str, Floats | None]:
        return {f"GPU {gpu}": curve for (gpu,), curve in history.gauges(name, edges, by, target=target).items()}

    compute = history.rates(f"{STAGE}_sum", edges, target=target, stage="compute").get(())
    queued = history.gauges("ringmesh_worker_queue_depth", edges, target=target).get(())
    memory = history.gauges("ringmesh_process_resident_memory_bytes", edges, target=target).get(())
    gpus = _gpus(history, target)
    charts = [
        plot("Requests/s", edges, {"ok": runs("ok"), "failed": runs("failed")}, units.number),
        plot("Compute time per second", edges, {"compute": compute}, units.seconds),
        plot("Requests that wait for a batch", edges, {"waiting": queued}, units.number),
        plot("Memory of the process", edges, {"resident": memory}, units.size),
    ]
    if gpus:
        charts += [
            plot("GPU use", edges, gauges("ringmesh_gpu_use_ratio"), units.percent, least=1.0),
            plot("GPU memory", edges, gauges("ringmesh_gpu_memory_used_bytes"), units.size),
        ]
    return {
        **row,
        "process": next((row for row in fleet_page.process_rows(sources) if row["name"] == target), None),
        "free": history.last("ringmesh_host_memory_bytes", target=target, state="available")[()],
        "switches": options.switches,
        "charts": charts,
        "gpus": gpus,
        "models": _models(sources, target),
        "failures": [failure for failure in sources.view.failures if failure.worker == target],
    }


def _gpus(history: History, target: str) -> list[Row]:
    values = {part: history.last(f"ringmesh_gpu_{part}", ("gpu", "name"), target=target) for part in _GPU}
    keys = sorted({key for by_gpu in values.values() for key in by_gpu})
    return [{"gpu": key[0], "name": key[1], **{part: values[part][key] for part in _GPU}} for key in keys]


def _models(sources: Sources, target: str) -> list[Row]:
    """Returns the models on the worker: memory in bytes, requests per second, and mean times in seconds."""
    history, by = sources.history, ("model", "version")
    memory = history.last("ringmesh_worker_model_bytes", by, target=target)
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, by, target=target)
    mean = overview.means(history, STAGE, NOW_SECONDS, (*by, "stage"), target=target)
    return [
        {
            "served": replica.served,
            "memory": memory[key],
            "rate": rate[key],
            "queue": mean[*key, "queue"],
            "compute": mean[*key, "compute"],
        }
        for model in sources.view.models
        for replica in model.replicas
        if replica.worker == target
        for key in [(model.name, model.version)]
    ]
