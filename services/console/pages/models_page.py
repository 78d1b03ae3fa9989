"""The model pages: versions, the workers that serve them, their key metrics, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from google.protobuf import text_format
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc, model_config_pb2
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console.data import overview
from services.console.data.fleet_watch import ModelView, ask
from services.console.data.history import History
from services.console.data.overview import NOW_SECONDS, STAGE
from services.console.data.sources import Sources
from services.console.pages import ensemble_graph, form, request_charts
from services.console.pages.confirmation import Confirmation
from services.console.pages.fleet_page import Row
from services.console.pages.live import Context
from services.console.pages.request_charts import ChartOptions
from services.console.security import visitor_of
from services.console.visitor import Visitor

_SECONDS = 2.0
_LOAD_SECONDS = 120.0
_Stub: TypeAlias = "grpc_service_pb2_grpc.GRPCInferenceServiceAsyncStub"
# Orders of the table by the key metric, the highest first.
ORDERS = {"busiest": "requests", "slowest": "p99", "failing": "errors", "costliest": "spent"}


async def listing(sources: Sources, request: Request) -> Context:
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
    """Returns the context of `model.html`: all versions of one model. A POST loads or unloads the model first."""
    name = request.path_params["name"]
    versions = [model for model in sources.view.models if model.name == name]
    if not versions:
        raise HTTPException(404, f"No router knows a model {name!r}. A new model appears after some seconds.")
    action, options = Confirmation(), ChartOptions(request, "version", "worker")
    config = None
    if (stub := _stub(sources)) is not None:
        if request.method == "POST":
            action = await _change(sources, name, await form.read(request), visitor_of(request))
        config, _ = await ask(lambda: stub.ModelConfig(v2.ModelConfigRequest(name=name), timeout=_SECONDS))
    ensembles = [
        replica.served.ensemble.config
        for model in versions
        for replica in model.replicas
        if replica.served.HasField("ensemble")
    ]
    shown = config.config if config is not None else next(iter(ensembles), model_config_pb2.ModelConfig())
    return {
        "name": name,
        "action": action,
        "is_served": any(model.state == "READY" for model in versions),
        "rows": _rows(sources, versions),
        "replicas": _replicas(sources.history, name, versions),
        "failures": [failure for failure in sources.view.failures if failure.model == name],
        "charts": request_charts.charts(sources.history, options, model=name),
        "switches": options.switches,
        "metadata": await metadata(sources, name),
        "graph": ensemble_graph.draw(shown),
        "config": text_format.MessageToString(shown),
    }


async def _change(sources: Sources, name: str, sent: Mapping[str, str], visitor: Visitor) -> Confirmation:
    """Loads or unloads the model on all workers, once the form is confirmed, in the name of the visitor."""
    if (verb := sent.get("action", "")) not in ("load", "unload"):
        return Confirmation(problem="Choose whether to load or to unload the model.")
    effect = "Requests for it fail until it is loaded again." if verb == "unload" else "Its files are read again."
    if not sent.get("confirmed"):
        question = f"{verb.capitalize()} {name} on all workers? {effect}"
        return Confirmation(question, {"action": verb}, f"{verb.capitalize()} it")
    load, unload = v2.RepositoryModelLoadRequest(model_name=name), v2.RepositoryModelUnloadRequest(model_name=name)
    if (router := sources.view.router) is None:
        return Confirmation(problem="No router answers.")
    async with sources.fleet.calling(router.address, visitor.authorization) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        done, problem = await ask(
            lambda: (
                stub.RepositoryModelLoad(load, timeout=_LOAD_SECONDS)
                if verb == "load"
                else stub.RepositoryModelUnload(unload, timeout=_LOAD_SECONDS)
            )
        )
    if done is None:
        return Confirmation(problem=f"{name} was not {verb}ed: {problem}")
    return Confirmation(notice=f"{name} was {verb}ed on all workers. The state below follows within some seconds.")


async def metadata(sources: Sources, name: str) -> v2.ModelMetadataResponse | None:
    """Returns the inputs and outputs of the default version; None if no router answers."""
    if (stub := _stub(sources)) is None:
        return None
    answer, _ = await ask(lambda: stub.ModelMetadata(v2.ModelMetadataRequest(name=name), timeout=_SECONDS))
    return answer


def _stub(sources: Sources) -> _Stub | None:
    """Returns a stub of the first router that answers; None if none does."""
    if (router := sources.view.router) is None:
        return None
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(sources.fleet.channel(router.address))


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


def _replicas(history: History, name: str, versions: Sequence[ModelView]) -> list[Row]:
    """Returns the model's versions on each worker, with requests per second and mean times in seconds."""
    by = ("version", "target")
    mean = overview.means(history, STAGE, NOW_SECONDS, (*by, "stage"), model=name)
    rate = history.rate("ringmesh_worker_requests_total", NOW_SECONDS, by, model=name)
    return [
        {
            "replica": replica,
            "rate": rate[key],
            "queue": mean[*key, "queue"],
            "compute": mean[*key, "compute"],
        }
        for model in versions
        for replica in model.replicas
        for key in [(model.version, replica.worker)]
    ]
