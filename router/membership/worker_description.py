"""Validates a worker's description, so that an invalid one does not affect other workers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ringmesh.inference.v1 import inference_pb2

from router.balancing.catalog import Catalog

_DIGEST_BYTES = 16
_LONGEST_TEXT = 1024
_LARGEST_WEIGHT = 1e9
_MOST_DIGITS = 18
_LARGEST_MS = 1 << 53


def is_text(text: str) -> bool:
    """Whether the text may be displayed and sent as metadata: no control characters, at most _LONGEST_TEXT long."""
    return len(text) <= _LONGEST_TEXT and text.isprintable()


def is_address(address: str) -> bool:
    """Whether the address is host:port."""
    host, _, port = address.rpartition(":")
    return (
        bool(host)
        and " " not in host
        and is_text(host)
        and port.isascii()
        and port.isdecimal()
        and 0 < int(port[:6]) < 1 << 16
    )


def is_weight(weight: float) -> bool:
    """Whether the weight is valid for a ring."""
    return 0 < weight <= _LARGEST_WEIGHT


def nonsense(told: inference_pb2.DescribeResponse, models: Iterable[inference_pb2.ModelVersion]) -> str:
    """Why the description of a worker that holds `models` is invalid; "" if it is valid."""
    for name, text in (
        *(("id", told.worker_id), ("region", told.region), ("zone", told.zone)),
        ("envelope socket", told.envelope_socket),
    ):
        if not is_text(text):
            return f"its {name} is {text[:80]!r}"
    if told.weight and not is_weight(told.weight):
        return f"its weight is {told.weight:g}"
    for failure in told.failed:
        if not (is_text(failure.model) and is_text(failure.version) and is_text(failure.reason)):
            return f"model {failure.model[:80]!r}: it failed to load, and why is not told in text"
    seen: set[tuple[str, str]] = set()
    for model in models:
        if why := _nonsense_of(model):
            return f"model {model.name[:80]!r}: {why}"
        if (model.name, model.version) in seen:
            return f"model {model.name!r}: version {model.version} is listed twice"
        seen.add((model.name, model.version))
    try:
        Catalog([models])
    except Exception as error:  # such as the plan of an ensemble
        return f"its models do not make a catalog: {error!r}"
    return ""


def _nonsense_of(model: inference_pb2.ModelVersion) -> str:
    if not model.name or not is_text(model.name):
        return "that is no name"
    if not (model.version.isascii() and model.version.isdecimal() and len(model.version) <= _MOST_DIGITS):
        return f"its version is {model.version[:80]!r}, not an integer"
    # An ensemble whose steps are on other workers may have no digest: the router derives it from those of the steps.
    if len(model.digest) != _DIGEST_BYTES and (model.digest or not model.HasField("ensemble")):
        return f"its digest has {len(model.digest)} bytes, not {_DIGEST_BYTES}"
    if not (math.isfinite(model.semantic_threshold) and 0 <= model.semantic_threshold <= 1):
        return f"its semantic_threshold is {model.semantic_threshold:g}"
    if max(model.ttl_ms, model.stale_ms) > _LARGEST_MS:
        return f"its answers are fresh for {max(model.ttl_ms, model.stale_ms)} ms"
    return ""
