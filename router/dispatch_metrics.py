"""Attempts, retries and refusals, as metrics."""

from __future__ import annotations

from services.runtime.metrics import Family

ATTEMPTS = Family(
    "ringmesh_attempts_total",
    "counter",
    "requests sent to workers; kind: first, retry, hedge; code: of the answer, UNAVAILABLE where none came",
    ("worker", "kind", "code"),
)
ATTEMPT_SECONDS = Family(
    "ringmesh_attempt_duration_seconds", "histogram", "from sending a request to a worker to its answer", ("worker",)
)
RETRIES_DENIED = Family("ringmesh_retries_denied_total", "counter", "retries not made, to keep within the budget")
SHEDS = Family("ringmesh_sheds_total", "counter", "requests refused; reason: overload, quota", ("reason",))
EJECTIONS = Family(
    "ringmesh_ejections_total", "counter", "times a worker was ejected for answering worse than others", ("worker",)
)
