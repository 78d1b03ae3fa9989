"""The first page as JSON, for `ringmesh top`. Numbers are formatted already, so that both show the same text."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.console.data import overview
from services.console.data.sources import Sources
from services.console.data.units import number, percent, seconds, size
from services.console.pages import fleet_page, models_page


async def summary(sources: Sources, request: Request) -> Response:
    """Returns headline, findings, vitals, and tables of workers, models and processes, in display order."""
    vitals = overview.vitals(sources.history)
    models = (await models_page.listing(sources, request))["models"]
    # The busiest first, because a terminal shows only some of them.
    models.sort(key=lambda row: -max(0.0, row["vitals"].requests))
    return JSONResponse(
        {
            "headline": fleet_page.headline(sources, vitals),
            "findings": [asdict(finding) for finding in sources.findings()],
            "vitals": {
                "requests_s": number(vitals.requests),
                "from_cache": percent(vitals.hit_ratio),
                "p50": seconds(vitals.p50),
                "p99": seconds(vitals.p99),
                "failed_s": number(vitals.errors),
                "compute_saved": f"{seconds(vitals.saved)} a second",
            },
            "workers": [
                {
                    "worker": worker.id or worker.address,
                    "state": "serves" if worker.healthy else f"out: {worker.reason}",
                    "owns": percent(worker.share),
                    "in_flight": number(worker.in_flight),
                    "load": number(worker.load),
                    "queued": number(row["queued"]),
                    "runs_s": number(row["rate"]),
                    "compute": seconds(row["compute"]),
                }
                for row in fleet_page.worker_rows(sources)
                for worker in [row["worker"]]
            ],
            "models": [
                {
                    "model": f"{model.name} {model.version}".rstrip(),
                    "state": model.state.lower() or "not loaded",
                    "requests_s": number(vitals.requests),
                    "from_cache": percent(vitals.hit_ratio),
                    "p50": seconds(vitals.p50),
                    "p99": seconds(vitals.p99),
                    "failed_s": number(vitals.errors),
                    "batch_rows": number(row["rows"]),
                }
                for row in models
                for model, vitals in [(row["model"], row["vitals"])]
            ],
            "processes": [
                {
                    "process": row["name"],
                    "metrics_at": row["problem"] or row["address"],
                    "cpu": percent(row["cpu"]),
                    "memory": size(row["memory"]),
                    "open_files": number(row["files"]),
                    "loop_lag_p99": seconds(row["lag"]),
                }
                for row in fleet_page.process_rows(sources)
            ],
        }
    )
