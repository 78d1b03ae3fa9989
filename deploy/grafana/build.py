"""Writes the dashboards of this folder: python deploy/grafana/build.py. What they show is listed here, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "dashboards"
_MODEL = 'model=~"$model"'


class Query(NamedTuple):
    """PromQL, and the legend of its lines."""

    promql: str
    legend: str


Panel = tuple[str, str, tuple[Query, ...]]


def panel(title: str, unit: str, *queries: Query) -> Panel:
    return title, unit, queries


def rate(metric: str, where: str = "") -> str:
    return f"rate({metric}{f'{{{where}}}' if where else ''}[$__rate_interval])"


def total(expression: str, by: str, legend: str = "", how: str = "sum") -> Query:
    """The sum for each combination of the labels `by`, which the legend shows unless one is given."""
    labels = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return Query(f"{how} by ({by}) ({expression})", legend or labels)


def quantile(q: float, metric: str, by: str = "", where: str = "") -> Query:
    shown = total("", by).legend if by else f"p{q * 100:g}"
    labels = f"le, {by}" if by else "le"
    bucket = f"rate({metric}_bucket{{{where}}}[$__rate_interval])"
    return Query(f"histogram_quantile({q}, sum by ({labels}) ({bucket}))", shown)


_REQUESTS = rate("ringmesh_requests_total", _MODEL)
_DURATION = "ringmesh_request_duration_seconds"
_COMPUTED, _NOT_COMPUTED = f'{_MODEL},outcome=~"miss|bypass"', f'{_MODEL},outcome!~"miss|bypass"'
_COST = total(rate("ringmesh_cost_total", f'{_MODEL},kind=~"spent|saved"'), "model, kind")
_HITS = total(rate("ringmesh_cache_lookups_total", 'result="hit"'), "tier")
_SHARED_EVICTIONS = rate("ringmesh_cache_evictions_total", 'tier="shared"')
_ROWS, _BATCHES = (total(rate(f"ringmesh_worker_batch_rows_{of}", _MODEL), "model") for of in ("sum", "count"))

# Uid, then title and rows of panels.
DASHBOARDS: dict[str, tuple[str, dict[str, list[Panel]]]] = {
    "ringmesh-service": (
        "Ringmesh: service",
        {
            "Objectives": [
                panel("Requests failed by us", "percentunit", Query("ringmesh:unavailable:ratio_rate5m", "{{model}}")),
                panel("Answers slower than 300 ms", "percentunit", Query("ringmesh:slow:ratio_rate5m", "{{model}}")),
                panel(
                    "Burn of the month's budget, 1 h",
                    "none",
                    Query("ringmesh:unavailable:ratio_rate1h / 0.001", "availability {{model}}"),
                    Query("ringmesh:slow:ratio_rate1h / 0.01", "latency {{model}}"),
                ),
            ],
            "Requests": [
                panel("Requests by outcome", "reqps", total(_REQUESTS, "outcome")),
                panel("Requests by model", "reqps", total(_REQUESTS, "model, version")),
                panel(
                    "Failures by code",
                    "reqps",
                    total(
                        rate("ringmesh_requests_total", f'{_MODEL},code!="OK"'),
                        "model, tenant, code",
                        "{{code}} {{model}} {{tenant}}",
                    ),
                ),
                panel("Time to answer", "s", *(quantile(q, _DURATION, where=_MODEL) for q in (0.5, 0.9, 0.99))),
                panel("Time to answer, p99 by outcome", "s", quantile(0.99, _DURATION, "outcome", _MODEL)),
                panel("Under way", "none", total("ringmesh_requests_in_flight", "instance")),
            ],
            "Cost": [
                panel(
                    "Cost, 30 days like this, in RINGMESH_CURRENCY",
                    "none",
                    Query(f"{_COST.promql} * 2592000", _COST.legend),
                ),
                panel("Compute spent", "s", total(rate("ringmesh_compute_seconds_total", _COMPUTED), "model, tenant")),
                panel(
                    "Compute saved", "s", total(rate("ringmesh_compute_seconds_total", _NOT_COMPUTED), "model, tenant")
                ),
            ],
        },
    ),
    "ringmesh-fleet": (
        "Ringmesh: workers and ring",
        {
            "Ring": [
                panel(
                    "Workers that serve",
                    "none",
                    total("ringmesh_ring_member_healthy", "instance", "seen by {{instance}}"),
                ),
                panel("Keys owned", "percentunit", total("ringmesh_ring_member_share_ratio", "worker", how="max")),
                panel("Requests in flight", "none", total("ringmesh_ring_member_in_flight", "worker")),
            ],
            "Workers": [
                panel("Runs", "reqps", total(rate("ringmesh_worker_requests_total", _MODEL), "instance")),
                panel(
                    "Mean compute",
                    "s",
                    Query(f"ringmesh:worker_compute_seconds:mean5m{{{_MODEL}}}", "{{instance}} {{model}}"),
                ),
                panel(
                    "Queue, p99",
                    "s",
                    quantile(0.99, "ringmesh_worker_stage_seconds", "instance", f'{_MODEL},stage="queue"'),
                ),
                panel("Queue depth", "none", total(f"ringmesh_worker_queue_depth{{{_MODEL}}}", "instance, model")),
                panel("Rows of a batch, mean", "none", Query(f"{_ROWS.promql} / {_BATCHES.promql}", "{{model}}")),
                panel("Models held", "none", total("ringmesh_worker_model_info", "instance, provider")),
            ],
            "Processes": [
                panel("CPU", "percentunit", Query(rate("ringmesh_process_cpu_seconds_total"), "{{instance}}")),
                panel("Memory", "bytes", Query("ringmesh_process_resident_memory_bytes", "{{instance}}")),
                panel("Open files", "none", Query("ringmesh_process_open_files", "{{instance}}")),
                panel("Event loop lag, p99", "s", quantile(0.99, "ringmesh_event_loop_lag_seconds", "instance")),
            ],
        },
    ),
    "ringmesh-cache": (
        "Ringmesh: cache",
        {
            "Use": [
                panel(
                    "Hit ratio",
                    "percentunit",
                    Query("ringmesh:hit:ratio_rate30m", "answers, 30 min"),
                    Query(f"{_HITS.promql} / {total(rate('ringmesh_cache_lookups_total'), 'tier').promql}", "{{tier}}"),
                ),
                panel("Compute saved", "s", total(rate("ringmesh_cache_saved_compute_seconds_total"), "tier")),
                panel(
                    "Fills and evictions",
                    "ops",
                    total(rate("ringmesh_cache_fills_total"), "tier", "fills {{tier}}"),
                    total(rate("ringmesh_cache_evictions_total", 'tier="local"'), "model", "evictions local {{model}}"),
                    Query(f"max({_SHARED_EVICTIONS})", "evictions Redis"),
                ),
                panel("Memory", "bytes", total("ringmesh_cache_bytes", "instance")),
                panel("Entries", "none", total("ringmesh_cache_entries", "instance")),
            ],
            "Audit": [
                panel("Hits computed again", "ops", total(rate("ringmesh_cache_audits_total"), "model, result")),
                panel(
                    "Largest difference", "none", total("ringmesh_cache_audit_largest_difference", "model", how="max")
                ),
                panel("Taken off the cache", "none", total("ringmesh_cache_audit_distrusted", "model", how="max")),
            ],
            "Redis": [
                panel("Skipped", "none", Query("ringmesh_redis_breaker_open", "{{instance}}")),
                panel("Given up", "ops", total(rate("ringmesh_cache_failures_total"), "instance, tier")),
                panel("Round trip, p99", "s", quantile(0.99, "ringmesh_redis_duration_seconds", "instance, operation")),
            ],
        },
    ),
}


def build(uid: str) -> str:
    title, rows = DASHBOARDS[uid]
    panels: list[dict[str, Any]] = []
    y = 0
    for name, row in rows.items():
        panels.append({"type": "row", "title": name, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "collapsed": False})
        y += 1
        for index, (panel_title, unit, queries) in enumerate(row):
            panels.append(
                {
                    "type": "timeseries",
                    "title": panel_title,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"x": 8 * (index % 3), "y": y + 7 * (index // 3), "w": 8, "h": 7},
                    "fieldConfig": {
                        "defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}},
                        "overrides": [],
                    },
                    "options": {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list"}},
                    "targets": [
                        {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "exemplar": True}
                        for number, (query, legend) in enumerate(queries)
                    ],
                }
            )
        y += 7 * ((len(row) + 2) // 3)
    for number, made in enumerate(panels, start=1):
        made["id"] = number
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "model",
            "type": "query",
            "label": "Model",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": "label_values(ringmesh_requests_total, model)",
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "refresh": 2,
        },
    ]
    dashboard = {
        "uid": uid,
        "title": title,
        "tags": ["ringmesh"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["ringmesh"], "title": "Ringmesh", "asDropdown": True}],
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(build(name))
