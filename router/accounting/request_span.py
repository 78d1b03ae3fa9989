"""Attributes of a request's span."""

from __future__ import annotations  # compiled by mypyc

from cache.mesh import Found
from services.runtime import w3c
from services.runtime.telemetry.spans import Value

_TIERS = {"hit-local": "local", "hit-shared": "shared", "hit-peer": "peer"}


def answered(found: Found, now_ns: int) -> dict[str, Value]:
    """The source of the answer and its compute time."""
    entry = found.entry
    attributes: dict[str, Value] = {
        "ringmesh.cache.outcome": found.outcome,
        "ringmesh.response.bytes": len(entry.value),
        "ringmesh.compute_us": entry.compute_us,
    }
    if found.worker:
        attributes["ringmesh.worker.id"] = found.worker
    if tier := _TIERS.get(found.outcome):
        attributes["ringmesh.cache.tier"] = tier
        attributes["ringmesh.cache.age_ms"] = now_ns // 1_000_000 - entry.created_at_ms
    return attributes


def baggage(sent: str) -> dict[str, Value]:
    """The caller's baggage as attributes, so that traces can be searched by it."""
    return {f"baggage.{key}": value for key, value in w3c.parse_baggage(sent).items()}
