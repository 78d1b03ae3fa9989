"""The models this worker holds, by name and version, each with what forms its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from services.inference.batcher import Batcher
from services.inference.model import OnnxModel
from services.inference.sequencer import Sequencer
from services.inference.statistics import Statistics
from services.runtime.errors import NotFoundError

if TYPE_CHECKING:
    from services.inference.ensemble import Ensemble


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A loaded model version, ready to run. An ensemble is its own batcher."""

    model: OnnxModel | Ensemble
    batcher: Batcher | Sequencer | Ensemble
    statistics: Statistics

    def over(self, models: HeldModels) -> HeldModel:
        """Itself; an ensemble with the steps that are in `models`."""
        if isinstance(self.model, OnnxModel):
            return self
        resolved = self.model.resolved(models)
        return replace(self, model=resolved, batcher=resolved)


class HeldModels:
    """An immutable set of loaded models."""

    def __init__(self, models: Iterable[HeldModel]) -> None:
        self._by_name: dict[str, dict[str, HeldModel]] = {}
        held_models = sorted(models, key=lambda held: (held.model.name, held.model.version))
        for held in held_models:
            self._by_name.setdefault(held.model.name, {})[str(held.model.version)] = held
        for held in held_models:
            self._by_name[held.model.name][str(held.model.version)] = held.over(self)

    def __iter__(self) -> Iterator[HeldModel]:
        return (held for versions in self._by_name.values() for held in versions.values())

    def of(self, name: str) -> list[HeldModel]:
        """The versions of a model, oldest first; [] where it is not held."""
        return list(self._by_name.get(name, {}).values())

    def versions(self, name: str) -> list[str]:
        """Oldest first. Raises NotFoundError."""
        return list(self._versions(name))

    def find(self, name: str, version: str) -> HeldModel:
        """The version asked for, or the latest where it is "". Raises NotFoundError with what there is."""
        versions = self._versions(name)
        if not version:
            return next(reversed(versions.values()))
        held = versions.get(version)
        if held is None:
            known = ", ".join(versions)
            raise NotFoundError(f"model {name!r} has no version {version!r}; it has: {known}", field="model_version")
        return held

    def _versions(self, name: str) -> dict[str, HeldModel]:
        versions = self._by_name.get(name)
        if versions is None:
            known = ", ".join(self._by_name) or "none"
            raise NotFoundError(f"no model {name!r}; there are: {known}", field="model_name")
        return versions
