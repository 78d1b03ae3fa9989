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


def is_weight(weight: float) -> bool:
    return 0 < weight <= _LARGEST_WEIGHT


class InvalidDescriptionError(Exception):
    """The message says what is invalid."""


def check_description(described: inference_pb2.DescribeResponse, models: Iterable[inference_pb2.ModelVersion]) -> None:
    """Raises InvalidDescriptionError if the description of a worker that holds `models` is invalid."""
    for name, text in (
        *(("id", described.worker_id), ("region", described.region), ("zone", described.zone)),
        ("envelope socket", described.envelope_socket),
    ):
        if not is_text(text):
            raise InvalidDescriptionError(
                f"its {name} is {text[:80]!r}, not printable text of at most {_LONGEST_TEXT} characters"
            )
    if described.weight and not is_weight(described.weight):
        raise InvalidDescriptionError(
            f"its weight is {described.weight:g}, not above 0 and at most {_LARGEST_WEIGHT:g}"
        )
    for failure in described.failed:
        if not (is_text(failure.model) and is_text(failure.version) and is_text(failure.reason)):
            raise InvalidDescriptionError(f"model {failure.model[:80]!r}: it failed to load, and the reason is no text")
    seen: set[tuple[str, str]] = set()
    for model in models:
        _check_model(model)
        if (model.name, model.version) in seen:
            raise InvalidDescriptionError(f"model {model.name!r}: version {model.version} is listed twice")
        seen.add((model.name, model.version))
    try:
        Catalog([models])
    except Exception as error:  # such as the plan of an ensemble
        raise InvalidDescriptionError(f"its models do not make a catalog: {error!r}") from None


def _check_model(model: inference_pb2.ModelVersion) -> None:
    model_name = f"model {model.name[:80]!r}"
    if not model.name or not is_text(model.name):
        raise InvalidDescriptionError(f"{model_name}: its name is empty or not printable")
    if not (model.version.isascii() and model.version.isdecimal() and len(model.version) <= _MOST_DIGITS):
        raise InvalidDescriptionError(f"{model_name}: its version is {model.version[:80]!r}, not an integer")
    # An ensemble whose steps are on other workers may have no digest: the router derives it from those of the steps.
    if len(model.digest) != _DIGEST_BYTES and (model.digest or not model.HasField("ensemble")):
        raise InvalidDescriptionError(f"{model_name}: its digest has {len(model.digest)} bytes, not {_DIGEST_BYTES}")
    if not (math.isfinite(model.semantic_threshold) and 0 <= model.semantic_threshold <= 1):
        raise InvalidDescriptionError(
            f"{model_name}: its semantic_threshold is {model.semantic_threshold:g}, not 0 to 1"
        )
    if max(model.ttl_ms, model.stale_ms) > _LARGEST_MS:
        raise InvalidDescriptionError(f"{model_name}: its answers are fresh for {max(model.ttl_ms, model.stale_ms)} ms")
