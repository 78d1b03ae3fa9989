"""The models that this worker holds, by name and version, each with its batcher."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from services.inference.codec.request import Decoded
from services.inference.execution.model import OnnxModel
from services.inference.models.ensemble import Ensemble
from services.inference.models.memory_budget import Resident
from services.inference.repository.snapshots import Snapshot
from services.inference.scheduling.batcher import Batcher, BatchResult
from services.inference.scheduling.sequencer import Sequencer
from services.inference.scheduling.statistics import Statistics
from services.runtime.oip.absent_model import Failures, absent


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model version, ready to run. An ensemble is its own batcher.

    Under a memory budget it may not be in memory; `submit` then loads it first.
    """

    model: OnnxModel | Ensemble
    batcher: Batcher | Sequencer | Ensemble
    statistics: Statistics
    resident: Resident | None = None
    # The files of the model; an ensemble has none.
    snapshot: Snapshot | None = None

    @property
    def loaded(self) -> bool:
        return self.resident is None or self.resident.loaded

    @property
    def waiting(self) -> int:
        return self.batcher.waiting + (0 if self.resident is None else len(self.resident.waiting))

    def submit(self, decoded: Decoded, deadline: float | None) -> Coroutine[Any, Any, BatchResult]:
        """Runs a request, as Batcher.submit. Also raises the errors of MemoryBudget.enter."""
        if self.resident is None:
            return self.batcher.submit(decoded, deadline)
        return self._submit(self.resident, decoded, deadline)

    async def _submit(self, resident: Resident, decoded: Decoded, deadline: float | None) -> BatchResult:
        await resident.budget.enter(resident, deadline)
        try:
            return await self.batcher.submit(decoded, deadline)
        finally:
            resident.budget.leave(resident)

    def over(self, models: HeldModels) -> HeldModel:
        """This model; for an ensemble, a copy with its steps looked up in `models`."""
        if isinstance(self.model, OnnxModel):
            return self
        resolved = self.model.resolved(models.find)
        return replace(self, model=resolved, batcher=resolved)


_NO_FAILURES: Failures = {}


class HeldModels:
    """An immutable set of loaded models. `failures`: why other versions are not loaded. `suggests`: errors may name
    another model."""

    def __init__(
        self, models: Iterable[HeldModel], failures: Failures = _NO_FAILURES, *, suggests: bool = True
    ) -> None:
        self.failures = failures
        self._suggests = suggests
        self._by_name: dict[str, dict[str, HeldModel]] = {}
        held_models = sorted(models, key=lambda held: (held.model.name, held.model.version))
        for held in held_models:
            self._by_name.setdefault(held.model.name, {})[str(held.model.version)] = held
        for held in held_models:
            self._by_name[held.model.name][str(held.model.version)] = held.over(self)

    def __iter__(self) -> Iterator[HeldModel]:
        return (held for versions in self._by_name.values() for held in versions.values())

    def of(self, name: str) -> list[HeldModel]:
        return list(self._by_name.get(name, {}).values())

    def versions(self, name: str) -> list[str]:
        return list(self._by_name.get(name, ()))

    def find(self, name: str, version: str) -> HeldModel:
        """A version of a model, or the latest if `version` is "". Raises the errors of `absent`."""
        versions = self._by_name.get(name)
        if versions is not None and not version:
            return next(reversed(versions.values()))
        held = versions.get(version) if versions is not None else None
        if held is None:
            raise absent(name, version, self._by_name, self.failures, suggests=self._suggests)
        return held
