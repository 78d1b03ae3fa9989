"""The model pages: versions, the workers that serve them, their key metrics, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import overview
from services.console.data.fleet_watch import ModelView, ask
from services.console.data.history import History
from services.console.data.overview import NOW_SECONDS, STAGE
from services.console.data.sources import Sources
from services.console.pages import fleet_page
from services.console.pages.fleet_page import Row
from services.console.pages.live import Context

_SECONDS = 2.0
# Orders of the table by the key metric, the highest first.
ORDERS = {"busiest": "requests", "slowest": "p99", "failing": "errors", "costliest": "spent"}


async def listing(sources: Sources, request: Request) -> Context:
    """Returns the context of `models.html`."""
    rows = _rows(sources, sources.view.models)
    text, order = (request.query_params.get(name, "").strip() for name in ("text", "order"))
    found = [row for row in rows if text.lower() in row["model"].name.lower()]
    if order in ORDERS:
        # Unknown values sort last.
        values = [getattr(row["vitals"], ORDERS[order]) for row in found]
        indices = sorted(range(len(found)), key=lambda i: math.inf if math.isnan(values[i]) else -values[i])
        found = [found[i] for i in indices]
    return {
        "models": found,
        "count": len(rows),
        "text": text,
        "order": order,
        "orders": tuple(ORDERS),
        "router": sources.view.router,
    }


async def one(sources: Sources, request: Request) -> Context:
    """Returns the context of `model.html`: all versions of one model."""
    name = request.path_params["name"]
    versions = [model for model in sources.view.models if model.name == name]
    if not versions:
        raise HTTPException(404, f"No router knows a model {name!r}. A new model appears after some seconds.")
    return {
        "name": name,
        "rows": _rows(sources, versions),
        "copies": _copies(sources.history, name, versions),
        "charts": fleet_page.charts(sources.history, model=name),
        "metadata": await metadata(sources, name),
    }


async def metadata(sources: Sources, name: str) -> v2.ModelMetadataResponse | None:
    """Returns the inputs and outputs of the default version; None if no router answers."""
    if (router := sources.view.router) is None:
        return None
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(sources.fleet.channel(router.address))
    answer, _ = await ask(lambda: stub.ModelMetadata(v2.ModelMetadataRequest(name=name), timeout=_SECONDS))
    return answer


def _rows(sources: Sources, models: Sequence[ModelView]) -> list[Row]:
    """Returns model versions with their key metrics of the last minute. `rows`: mean rows per batch."""
    history, by = sources.history, ("model", "version")
    vitals, idle = overview.vitals_by(history, by), overview.idle(history)
    rows = overview.means(history, "ringmesh_worker_batch_rows", NOW_SECONDS, by)
    return [
        {"model": model, "vitals": vitals.get(key, idle), "rows": rows[key]}
        for model in models
        for key in [(model.name, model.version)]
    ]


def _copies(history: History, name: str, versions: Sequence[ModelView]) -> list[Row]:
    """Returns the model's versions on each worker, with requests per second and mean times in seconds."""
    by = ("version", "target")
    mean = overview.means(history, STAGE, NOW_SECONDS, (*by, "stage"), model=name)
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, by, model=name)
    return [
        {
            "served": copy,
            "rate": rate[key],
            "queue": mean[*key, "queue"],
            "compute": mean[*key, "compute"],
        }
        for model in versions
        for copy in model.copies
        for key in [(model.version, copy.worker)]
    ]
