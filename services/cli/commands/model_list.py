"""`ringmesh models`: lists the models of the fleet."""

from __future__ import annotations

import grpc
from rich.markup import escape
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import running


def listing(router: str) -> Table:
    """Returns a table with one row per model version, with counts since the workers started. Raises CommandError."""

    async def call(
        channel: grpc.aio.Channel, seconds: float
    ) -> tuple[v2.RepositoryIndexResponse, v2.ModelStatisticsResponse]:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        index = await stub.RepositoryIndex(v2.RepositoryIndexRequest(), timeout=seconds)
        return index, await stub.ModelStatistics(v2.ModelStatisticsRequest(), timeout=seconds)

    index, statistics = running.ask(router, "router", call)
    counted = {(one.name, one.version): one for one in statistics.model_stats}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("model", "version", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("requests", "from cache", "failed", "mean ms", "compute ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remark", overflow="fold")
    for model in index.models:
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


def _mean_ms(duration: v2.StatisticDuration) -> str:
    return f"{duration.ns / duration.count / 1e6:.2f}" if duration.count else ""
