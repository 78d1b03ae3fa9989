"""`ringmesh models`: lists the models of the fleet."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from rich.markup import escape
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import running, tables
from services.cli.commands.sample_request import SampleRequest, sample


def first_look(router: str, secret: str) -> tuple[list[str], SampleRequest | None]:
    """Returns a message for each model that is not served, and a request for one that is, `mlp` if there is one.

    `secret`: the key secret of the stack. Raises CommandError.
    """

    def call(channel: grpc.Channel) -> tuple[list[str], SampleRequest | None]:
        models = _index(channel)
        failed = [
            f"model {model.name}{model.version and ' version '}{model.version} is not served: {model.reason}"
            for model in models
            if model.state != "READY"
        ]
        ready = sorted((model.name != "mlp", model.name) for model in models if model.state == "READY")
        return failed, sample(channel, ready[0][1]) if ready else None

    return running.ask(router, "router", call, secret)


def listing(router: str) -> Table:
    """Returns a table with one row per model version, with counts since the workers started. Raises CommandError."""
    models, counts = running.ask(
        router,
        "router",
        lambda channel: (
            _index(channel),
            grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStatistics(v2.ModelStatisticsRequest()),
        ),
    )
    counted = {(one.name, one.version): one for one in counts.model_stats}
    counters = (">requests", ">from cache", ">failed", ">mean ms", ">compute ms")
    table = tables.create("model", "version", "state", *counters)
    table.add_column("remark", overflow="fold")
    for model in models:
        stats = counted.get((model.name, model.version), v2.ModelStatistics()).inference_stats
        total = stats.success.count + stats.fail.count
        table.add_row(
            escape(model.name),
            model.version,
            model.state.lower(),
            f"{total:,}",
            f"{stats.cache_hit.count / total:.0%}" if total else "",
            f"{stats.fail.count:,}",
            _mean_ms(stats.success),
            _mean_ms(stats.compute_infer),
            escape(model.reason),
            style="" if model.state == "READY" else "yellow",
        )
    return table


def _index(channel: grpc.Channel) -> Sequence[v2.RepositoryIndexResponse.ModelIndex]:
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    return stub.RepositoryIndex(v2.RepositoryIndexRequest()).models


def _mean_ms(duration: v2.StatisticDuration) -> str:
    return f"{duration.ns / duration.count / 1e6:.2f}" if duration.count else ""
