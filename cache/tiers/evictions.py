"""Counts the evictions of the local tier by model."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable, Mapping

from cache.tiers.local_tier import LocalTier

_MAX_KNOWN = 4096
_MAX_MODELS = 200
# Counts items of other services, and models that are no longer known.
OTHER = "other"


class Evictions:
    """Counts since the process started. `models` maps the first 16 bytes of a key to a model.

    A model's keys change with its files and with purges, so earlier mappings are remembered.
    """

    def __init__(self, local: LocalTier, models: Callable[[], Mapping[bytes, str]] = dict) -> None:
        self._local = local
        self.models = models
        self._known: dict[bytes, str] = {}
        self._counts: dict[str, int] = {}

    def by_model(self) -> Mapping[str, int]:
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known.update(self.models())
        for prefix, count in self._local.take_evicted().items():
            model = self._known.get(prefix, OTHER)
            if model not in self._counts and len(self._counts) >= _MAX_MODELS:
                model = OTHER
            self._counts[model] = self._counts.get(model, 0) + count
        return self._counts
