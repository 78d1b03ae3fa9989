"""Models: which versions are served by whom, how they do, and what their inputs are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console import fleet_page, overview
from services.console.fleet_watch import ModelView, ask
from services.console.live import Context
from services.console.overview import NOW_SECONDS, STAGE, Vitals
from services.console.sources import Sources

_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model version and how it did in the last minute. `rows`: mean rows of a batch."""

    model: ModelView
    vitals: Vitals
    rows: float


@dataclass(frozen=True, slots=True)
class CopyRow:
    """A model version on one worker: runs a second, and mean times in seconds."""

    worker: str
    version: str
    provider: str
    digest: str
    uncacheable: str
    rate: float
    queue: float
    compute: float


async def listing(sources: Sources, _: Request) -> Context:
    """What `models.html` shows."""
    return {"models": [_row(sources, model) for model in sources.view.models], "router": sources.view.router}


async def one(sources: Sources, request: Request) -> Context:
    """What `model.html` shows: all versions of one name."""
    name = request.path_params["name"]
    versions = [model for model in sources.view.models if model.name == name]
    if not versions:
        raise HTTPException(
            404, f"No router knows a model {name!r}. A model that was loaded just now shows in some seconds."
        )
    return {
        "name": name,
        "rows": [_row(sources, model) for model in versions],
        "copies": [copy for model in versions for copy in _copies(sources, model)],
        "charts": fleet_page.charts(sources.history, model=name),
        "metadata": await metadata(sources, name),
    }


async def metadata(sources: Sources, name: str) -> v2.ModelMetadataResponse | None:
    """Inputs and outputs of the version that is served by default; None where no router can say."""
    if (router := sources.view.router) is None:
        return None
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(sources.fleet.channel(router.address))
    answer, _ = await ask(lambda: stub.ModelMetadata(v2.ModelMetadataRequest(name=name), timeout=_SECONDS))
    return answer


def _row(sources: Sources, model: ModelView) -> ModelRow:
    where = {"model": model.name, "version": model.version}
    rows = sources.history.increase("ringmesh_worker_batch_rows_sum", NOW_SECONDS, **where).get((), 0.0)
    runs = sources.history.increase("ringmesh_worker_batch_rows_count", NOW_SECONDS, **where).get((), 0.0)
    return ModelRow(model, overview.vitals(sources.history, **where), rows / runs if runs else math.nan)


def _copies(sources: Sources, model: ModelView) -> list[CopyRow]:
    history = sources.history
    made = []
    for copy in model.copies:
        where = {"model": model.name, "version": model.version, "target": copy.worker}
        total = history.increase(f"{STAGE}_sum", NOW_SECONDS, ("stage",), **where)
        count = history.increase(f"{STAGE}_count", NOW_SECONDS, ("stage",), **where)
        mean = {stage: total[stage,] / runs for (stage,), runs in count.items() if runs}
        rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, **where).get((), math.nan)
        made.append(
            CopyRow(
                copy.worker,
                model.version,
                copy.provider,
                copy.digest,
                copy.uncacheable,
                rate,
                mean.get("queue", math.nan),
                mean.get("compute", math.nan),
            )
        )
    return made
