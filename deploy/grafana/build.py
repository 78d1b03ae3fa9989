"""Writes the dashboards of this folder: python deploy/grafana/build.py. What they show is listed here, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
_R = "$__rate_interval"
_REQ = 'ringmesh_requests_total{model=~"$model"}'


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[{_R}])))"


Query = tuple[str, str]
# title, unit, queries as (PromQL, legend)
Panel = tuple[str, str, list[Query]]

DASHBOARDS: dict[str, tuple[str, list[tuple[str, list[Panel]]]]] = {
    "ringmesh-service": (
        "Ringmesh: service",
        [
            (
                "Objectives",
                [
                    ("Requests failed by us", "percentunit", [("ringmesh:unavailable:ratio_rate5m", "{{model}}")]),
                    ("Answers slower than 300 ms", "percentunit", [("ringmesh:slow:ratio_rate5m", "{{model}}")]),
                    (
                        "Burn of the month's budget, 1 h",
                        "none",
                        [
                            ("ringmesh:unavailable:ratio_rate1h / 0.001", "availability {{model}}"),
                            ("ringmesh:slow:ratio_rate1h / 0.01", "latency {{model}}"),
                        ],
                    ),
                ],
            ),
            (
                "Requests",
                [
                    ("Requests by outcome", "reqps", [(f"sum by (outcome) (rate({_REQ}[{_R}]))", "{{outcome}}")]),
                    (
                        "Requests by model",
                        "reqps",
                        [(f"sum by (model, version) (rate({_REQ}[{_R}]))", "{{model}} {{version}}")],
                    ),
                    (
                        "Failures by code",
                        "reqps",
                        [
                            (
                                f'sum by (model, tenant, code) (rate(ringmesh_requests_total{{model=~"$model",code!="OK"}}[{_R}]))',
                                "{{code}} {{model}} {{tenant}}",
                            )
                        ],
                    ),
                    (
                        "Time to answer",
                        "s",
                        [
                            (quantile(q, "ringmesh_request_duration_seconds", where='model=~"$model"'), f"p{q * 100:g}")
                            for q in (0.5, 0.9, 0.99)
                        ],
                    ),
                    (
                        "Time to answer, p99 by outcome",
                        "s",
                        [
                            (
                                quantile(0.99, "ringmesh_request_duration_seconds", "outcome", 'model=~"$model"'),
                                "{{outcome}}",
                            )
                        ],
                    ),
                    ("Under way", "none", [("sum by (instance) (ringmesh_requests_in_flight)", "{{instance}}")]),
                ],
            ),
            (
                "Cost",
                [
                    (
                        "Cost, 30 days like this, in RINGMESH_CURRENCY",
                        "none",
                        [
                            (
                                f'sum by (model, kind) (rate(ringmesh_cost_total{{model=~"$model",kind=~"spent|saved"}}[{_R}])) * 2592000',
                                "{{model}} {{kind}}",
                            )
                        ],
                    ),
                    (
                        "Compute spent",
                        "s",
                        [
                            (
                                f'sum by (model, tenant) (rate(ringmesh_compute_seconds_total{{model=~"$model",outcome=~"miss|bypass"}}[{_R}]))',
                                "{{model}} {{tenant}}",
                            )
                        ],
                    ),
                    (
                        "Compute saved",
                        "s",
                        [
                            (
                                f'sum by (model, tenant) (rate(ringmesh_compute_seconds_total{{model=~"$model",outcome!~"miss|bypass"}}[{_R}]))',
                                "{{model}} {{tenant}}",
                            )
                        ],
                    ),
                ],
            ),
        ],
    ),
    "ringmesh-fleet": (
        "Ringmesh: workers and ring",
        [
            (
                "Ring",
                [
                    (
                        "Workers that serve",
                        "none",
                        [("sum by (instance) (ringmesh_ring_member_healthy)", "seen by {{instance}}")],
                    ),
                    (
                        "Keys owned",
                        "percentunit",
                        [("max by (worker) (ringmesh_ring_member_share_ratio)", "{{worker}}")],
                    ),
                    (
                        "Requests in flight",
                        "none",
                        [("sum by (worker) (ringmesh_ring_member_in_flight)", "{{worker}}")],
                    ),
                ],
            ),
            (
                "Workers",
                [
                    (
                        "Runs",
                        "reqps",
                        [
                            (
                                f'sum by (instance) (rate(ringmesh_worker_requests_total{{model=~"$model"}}[{_R}]))',
                                "{{instance}}",
                            )
                        ],
                    ),
                    (
                        "Mean compute",
                        "s",
                        [('ringmesh:worker_compute_seconds:mean5m{model=~"$model"}', "{{instance}} {{model}}")],
                    ),
                    (
                        "Queue, p99",
                        "s",
                        [
                            (
                                quantile(
                                    0.99, "ringmesh_worker_stage_seconds", "instance", 'model=~"$model",stage="queue"'
                                ),
                                "{{instance}}",
                            )
                        ],
                    ),
                    (
                        "Queue depth",
                        "none",
                        [
                            (
                                'sum by (instance, model) (ringmesh_worker_queue_depth{model=~"$model"})',
                                "{{instance}} {{model}}",
                            )
                        ],
                    ),
                    (
                        "Rows of a batch, mean",
                        "none",
                        [
                            (
                                f'sum by (model) (rate(ringmesh_worker_batch_rows_sum{{model=~"$model"}}[{_R}])) / sum by (model) (rate(ringmesh_worker_batch_rows_count{{model=~"$model"}}[{_R}]))',
                                "{{model}}",
                            )
                        ],
                    ),
                    (
                        "Models held",
                        "none",
                        [("sum by (instance, provider) (ringmesh_worker_model_info)", "{{instance}} {{provider}}")],
                    ),
                ],
            ),
            (
                "Processes",
                [
                    ("CPU", "percentunit", [(f"rate(ringmesh_process_cpu_seconds_total[{_R}])", "{{instance}}")]),
                    ("Memory", "bytes", [("ringmesh_process_resident_memory_bytes", "{{instance}}")]),
                    ("Open files", "none", [("ringmesh_process_open_files", "{{instance}}")]),
                    (
                        "Event loop lag, p99",
                        "s",
                        [(quantile(0.99, "ringmesh_event_loop_lag_seconds", "instance"), "{{instance}}")],
                    ),
                ],
            ),
        ],
    ),
    "ringmesh-cache": (
        "Ringmesh: cache",
        [
            (
                "Use",
                [
                    (
                        "Hit ratio",
                        "percentunit",
                        [
                            ("ringmesh:hit:ratio_rate30m", "answers, 30 min"),
                            (
                                f'sum by (tier) (rate(ringmesh_cache_lookups_total{{result="hit"}}[{_R}])) / sum by (tier) (rate(ringmesh_cache_lookups_total[{_R}]))',
                                "{{tier}}",
                            ),
                        ],
                    ),
                    (
                        "Compute saved",
                        "s",
                        [(f"sum by (tier) (rate(ringmesh_cache_saved_compute_seconds_total[{_R}]))", "{{tier}}")],
                    ),
                    (
                        "Fills and evictions",
                        "ops",
                        [
                            (f"sum by (tier) (rate(ringmesh_cache_fills_total[{_R}]))", "fills {{tier}}"),
                            (
                                f'sum by (model) (rate(ringmesh_cache_evictions_total{{tier="local"}}[{_R}]))',
                                "evictions local {{model}}",
                            ),
                            (f'max(rate(ringmesh_cache_evictions_total{{tier="shared"}}[{_R}]))', "evictions Redis"),
                        ],
                    ),
                    ("Memory", "bytes", [("sum by (instance) (ringmesh_cache_bytes)", "{{instance}}")]),
                    ("Entries", "none", [("sum by (instance) (ringmesh_cache_entries)", "{{instance}}")]),
                ],
            ),
            (
                "Audit",
                [
                    (
                        "Hits computed again",
                        "ops",
                        [(f"sum by (model, result) (rate(ringmesh_cache_audits_total[{_R}]))", "{{model}} {{result}}")],
                    ),
                    (
                        "Largest difference",
                        "none",
                        [("max by (model) (ringmesh_cache_audit_largest_difference)", "{{model}}")],
                    ),
                    (
                        "Taken off the cache",
                        "none",
                        [("max by (model) (ringmesh_cache_audit_distrusted)", "{{model}}")],
                    ),
                ],
            ),
            (
                "Redis",
                [
                    ("Skipped", "none", [("ringmesh_redis_breaker_open", "{{instance}}")]),
                    (
                        "Given up",
                        "ops",
                        [
                            (
                                f"sum by (instance, tier) (rate(ringmesh_cache_failures_total[{_R}]))",
                                "{{instance}} {{tier}}",
                            )
                        ],
                    ),
                    (
                        "Round trip, p99",
                        "s",
                        [
                            (
                                quantile(0.99, "ringmesh_redis_duration_seconds", "instance, operation"),
                                "{{instance}} {{operation}}",
                            )
                        ],
                    ),
                ],
            ),
        ],
    ),
}


def build(uid: str) -> str:
    title, rows = DASHBOARDS[uid]
    panels: list[dict[str, Any]] = []
    y = 0
    for name, row in rows:
        panels.append({"type": "row", "title": name, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "collapsed": False})
        y += 1
        for index, (panel, unit, queries) in enumerate(row):
            panels.append(
                {
                    "type": "timeseries",
                    "title": panel,
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
    for number, panel_ in enumerate(panels, start=1):
        panel_["id"] = number
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
