"""The model pages: versions, the workers that serve them, their key metrics, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import overview
from services.console.data.fleet_watch import ModelView, ask
from services.console.data.history import History
from services.console.data.overview import NOW_SECONDS, STAGE, Vitals
from services.console.data.sources import Sources
from services.console.pages import fleet_page
from services.console.pages.live import Context

_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model version with its key metrics of the last minute. `rows`: mean rows per batch."""

    model: ModelView
    vitals: Vitals
    rows: float


@dataclass(frozen=True, slots=True)
class CopyRow:
    """A model version on one worker: runs per second, and mean times in seconds."""

    worker: str
    version: str
    provider: str
    digest: str
    uncacheable: str
    rate: float
    queue: float
    compute: float


ORDERS: Mapping[str, Callable[[ModelRow], float]] = {
    "busiest": lambda row: row.vitals.requests,
    "slowest": lambda row: row.vitals.p99,
    "failing": lambda row: row.vitals.errors,
    "costliest": lambda row: row.vitals.spent,
}


async def listing(sources: Sources, request: Request) -> Context:
    """Returns the context of `models.html`."""
    rows = _rows(sources, sources.view.models)
    text, order = (request.query_params.get(name, "").strip() for name in ("text", "order"))
    found = [row for row in rows if text.lower() in row.model.name.lower()]
    if order in ORDERS:
        # Unknown values sort last.
        found.sort(key=lambda row: -value if (value := ORDERS[order](row)) == value else math.inf)
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
        raise HTTPException(
            404, f"No router knows a model {name!r}. A model that was loaded just now shows in some seconds."
        )
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


def _rows(sources: Sources, models: Sequence[ModelView]) -> list[ModelRow]:
    history, by = sources.history, ("model", "version")
    vitals, nobody = overview.vitals_by(history, by), overview.unasked(history)
    rows = history.increase("ringmesh_worker_batch_rows_sum", NOW_SECONDS, by)
    runs = history.increase("ringmesh_worker_batch_rows_count", NOW_SECONDS, by)
    made = []
    for model in models:
        key = (model.name, model.version)
        mean = rows[key] / runs[key] if runs.get(key) else math.nan
        made.append(ModelRow(model, vitals.get(key, nobody), mean))
    return made


def _copies(history: History, name: str, versions: Sequence[ModelView]) -> list[CopyRow]:
    by = ("version", "target", "stage")
    total = history.increase(f"{STAGE}_sum", NOW_SECONDS, by, model=name)
    count = history.increase(f"{STAGE}_count", NOW_SECONDS, by, model=name)
    mean = {key: total[key] / runs for key, runs in count.items() if runs}
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, ("version", "target"), model=name)
    return [
        CopyRow(
            copy.worker,
            model.version,
            copy.provider,
            copy.digest,
            copy.uncacheable,
            rate.get((model.version, copy.worker), math.nan),
            mean.get((model.version, copy.worker, "queue"), math.nan),
            mean.get((model.version, copy.worker, "compute"), math.nan),
        )
        for model in versions
        for copy in model.copies
    ]
