"""The life cycle of models: load, warm up, switch, drain; what is broken leaves what works alone."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from services.inference import config, config_rules, repository
from services.inference.batcher import Batcher
from services.inference.config import ConfigError
from services.inference.crash_journal import UNWATCHED, CrashJournal, Watch
from services.inference.ensemble import Ensemble
from services.inference.held_models import HeldModel, HeldModels
from services.inference.memory_budget import MemoryBudget, resident_memory
from services.inference.model import ModelLoadError, OnnxModel
from services.inference.repository import (
    Fingerprint,
    ModelFiles,
    ModelSource,
    RepositoryError,
    RepositoryUnavailableError,
)
from services.inference.sequencer import Sequencer
from services.inference.statistics import Statistics
from services.runtime.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    RingmeshError,
    UnavailableError,
)

log = logging.getLogger(__name__)

READY, UNAVAILABLE = "READY", "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a load request brings along: a configuration as JSON, and files by `<version>/<name>`."""

    config: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionState:
    """A line of the repository index: READY (and why it is not cached) or UNAVAILABLE (and why)."""

    name: str
    version: str
    state: str
    reason: str = ""


class ModelStore:
    """The models of a repository and which of them are held. `held` is swapped here and nowhere else.

    `open_model` makes an OnnxModel of files; it runs on a thread, for it takes long.
    """

    def __init__(
        self,
        source: ModelSource,
        open_model: Callable[[ModelFiles], OnnxModel],
        executor: Executor,
        *,
        memory_limit: int = 0,
        process_memory: Callable[[], int] = resident_memory,
        journal: CrashJournal | None = None,
    ) -> None:
        """`memory_limit`: bytes of models in memory at once; 0: all that are held. `journal`: of what killed us."""
        self.held = HeldModels([])
        self._source = source
        self._open_model = open_model
        self._executor = executor
        self._journal = journal
        self._quarantined = False
        self._loaded: dict[str, Fingerprint] = {}
        self._failures: dict[str, dict[str, str]] = {}
        self._changing = asyncio.Lock()
        self._overrides: list[tempfile.TemporaryDirectory[str]] = []
        self._budget = (
            MemoryBudget(memory_limit, self._open_warm, process_memory, self._refresh) if memory_limit else None
        )
        self._catching_up: dict[str, asyncio.Task[None]] = {}

    async def load_all(self) -> None:
        """Loads every model; what failed is in the index.

        Raises RepositoryError where not one could be, but for those in quarantine: these can be let out.
        """
        # Before anything is read: what changes while it loads is seen by the first look.
        self._loaded = await asyncio.to_thread(self._source.fingerprint)
        names = await asyncio.to_thread(self._source.names)
        for name in names:
            try:
                await self.load(name)
            except RingmeshError as error:
                log.error("%s", error.message)
        if not self._quarantined and not any(True for _ in self.held):
            raise RepositoryError("; ".join(reason for failed in self._failures.values() for reason in failed.values()))

    async def load(self, name: str, overrides: Overrides | None = None, *, pardon: bool = False) -> None:
        """Loads a model, or loads it again: what answered goes on until the new one does, and then drains.

        `overrides` hold until the next load without them, and take the place of what the repository has. `pardon`
        ends its quarantine.
        Versions whose files and configuration did not change are kept as they are. Raises InvalidArgumentError with the
        cause, or UnavailableError where the repository cannot be read; then nothing has changed.
        """
        async with self._changing:
            try:
                files = await asyncio.to_thread(self._find, name, overrides or Overrides())
            except (RepositoryError, ConfigError) as error:
                self._failures.setdefault(name, {})[""] = str(error)
                kind = UnavailableError if isinstance(error, RepositoryUnavailableError) else InvalidArgumentError
                raise kind(f"failed to load {name!r}: {error}", field="model_name") from None
            held = self.held.of(name)
            fresh = []
            failures = {}
            for version in files:
                try:
                    fresh.append(await self._open(version, held, pardon))
                except ModelLoadError as error:
                    failures[str(version.version)] = str(error)
            self._failures[name] = failures
            if failures:
                await self._drain(model for model in fresh if model not in held)
                raise InvalidArgumentError(
                    f"failed to load {name!r}: {'; '.join(failures.values())}", field="model_name"
                )
            self._switch(name, fresh)
            await self._drain(model for model in held if model not in fresh)
            for model in fresh:
                if model.budget is not None and model.resident is not None:
                    await model.budget.load(model.resident)

    async def catch_up(self, name: str, deadline: float | None) -> None:
        """Loads a model whose files changed while it was out of memory. Raises UnavailableError where that fails."""
        task = self._catching_up.get(name)
        if task is None:
            task = self._catching_up[name] = asyncio.create_task(self.load(name))
            task.add_done_callback(lambda _: self._catching_up.pop(name))
        # Not by cancelling it: others wait for it too.
        seconds = None if deadline is None else deadline - time.monotonic()
        if not (await asyncio.wait([task], timeout=seconds))[0]:
            raise DeadlineExceededError("the deadline passed while the model was loaded")
        if error := task.exception():
            raise UnavailableError(str(error))

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Takes a model out at once, and returns when what it had taken is answered. Raises NotFoundError.

        `dependents`: the steps of an ensemble go with it.
        """
        async with self._changing:
            held = self.held.of(name)
            if not held:
                raise NotFoundError(f"model {name!r} is not loaded", field="model_name")
            names = {name}
            if dependents:
                names |= {
                    step.model
                    for ensemble in held
                    if isinstance(ensemble.model, Ensemble)
                    for step in ensemble.model.plan.steps
                }
            for gone in names:
                of_name = self.held.of(gone)
                self._switch(gone, [])
                self._failures[gone] = {str(model.model.version): "unloaded" for model in of_name}
                await self._drain(of_name)

    async def poll(self, seconds: float) -> None:
        """Follows the repository: loads what changed, once it has stopped changing, and unloads what went."""
        before = self._loaded
        served = dict(before)
        while True:
            await asyncio.sleep(seconds)
            now = await asyncio.to_thread(self._source.fingerprint)
            # A repository that cannot be read for a moment is not an empty one.
            if now and now == before != served:
                for name in sorted(now.keys() | served.keys()):
                    if now.get(name) != served.get(name) and await self._follow(name, name in now):
                        if name in now:
                            served[name] = now[name]
                        else:
                            del served[name]
            before = now

    async def _follow(self, name: str, exists: bool) -> bool:
        """Whether it is done with: a model that is broken is, one that could not be read is tried again."""
        try:
            if exists:
                await self.load(name)
            elif self.held.of(name):
                await self.unload(name)
        except RingmeshError as error:
            log.error("%s", error.message)
            return not isinstance(error, UnavailableError)
        return True

    async def index(self) -> list[VersionState]:
        """Every model in the repository, loaded or not, by name and version."""
        try:
            names = set(await asyncio.to_thread(self._source.names))
        except RepositoryError:
            names = set()
        states = {
            (held.model.name, str(held.model.version)): VersionState(
                held.model.name,
                str(held.model.version),
                UNAVAILABLE if held.resident is not None and held.resident.failure else READY,
                _remark(held),
            )
            for held in self.held
        }
        for name, failures in self._failures.items():
            for version, reason in failures.items():
                known = states.get((name, version))
                if known is not None and known.state == READY:  # the old one serves, the new one does not
                    states[name, version] = VersionState(
                        name, version, READY, f"the new files are not served: {reason}"
                    )
                else:
                    states[name, version] = VersionState(name, version, UNAVAILABLE, reason)
        for name in names - {name for name, _ in states}:
            states[name, ""] = VersionState(name, "", UNAVAILABLE, "not loaded")
        return [states[key] for key in sorted(states)]

    async def close(self) -> None:
        """Waits for the batches under way."""
        await self._drain(self.held)
        for folder in self._overrides:
            folder.cleanup()

    def _find(self, name: str, overrides: Overrides) -> list[ModelFiles]:
        configured = config.parse(overrides.config, "the config parameter", name) if overrides.config else None
        if not overrides.files:
            return repository.versions(self._source.fetch(name, configured), name, configured)
        if configured is None:
            raise ConfigError("files are given without a config parameter, which they need")
        # A new folder for each load: what is loaded may still be mapped from the last one.
        self._overrides.append(tempfile.TemporaryDirectory(prefix="ringmesh-models-"))
        folder = Path(self._overrides[-1].name)
        for path, data in overrides.files.items():
            version, _, file = path.partition("/")
            if not version.isdecimal() or not file or Path(file).name != file or not repository.is_name(name):
                raise ConfigError(f"a file is called {path!r}; it should be <version>/<name>")
            (folder / name / version).mkdir(parents=True, exist_ok=True)
            (folder / name / version / file).write_bytes(data)
        return repository.versions(folder, name, configured)

    async def _open(self, files: ModelFiles, held: list[HeldModel], pardon: bool) -> HeldModel:
        for kept in held:
            if kept.model.version == files.version:
                digest = await asyncio.to_thread(files.digest, kept.model.provider)
                if digest == kept.model.own_digest:
                    return kept
        if files.config.message.HasField("ensemble_scheduling"):
            ensemble = await asyncio.to_thread(Ensemble, files)
            return HeldModel(ensemble, ensemble, Statistics(ensemble.name, str(ensemble.version)))
        if self._journal is not None:
            digest = await asyncio.to_thread(files.digest, "")
            if pardon:
                self._journal.pardon(digest)
            if reason := self._journal.quarantine(digest):
                self._quarantined = True
                raise ModelLoadError(f"cannot load {files.model}: {reason}")
        budget, resident = self._budget, None
        if budget is None:
            model = await asyncio.to_thread(self._open_warm, files)
        else:
            resident = await budget.add(files, [kept.resident for kept in held if kept.resident is not None])
            model = resident.model
        made = files.config.message
        if ignored := config.ignored_fields(made):
            log.warning("model %s/%d: set but not acted on: %s", files.name, files.version, ", ".join(ignored))
        batcher = Batcher(
            model,
            self._executor,
            instances=config_rules.instances(made),
            batching=config.batching(made),
            watch=await asyncio.to_thread(self._watch, files),
        )
        statistics = Statistics(model.name, str(model.version))
        if not made.HasField("sequence_batching"):
            return HeldModel(model, batcher, statistics, budget, resident)
        try:
            sequencer = Sequencer(model, batcher, files.folder.parent)
            return HeldModel(model, sequencer, statistics, budget, resident)
        except ConfigError as error:
            if budget is not None and resident is not None:
                await budget.remove(resident)
            raise ModelLoadError(f"cannot load {files.model}: its config.pbtxt {error}") from None

    def _open_warm(self, files: ModelFiles) -> OnnxModel:
        """On a thread."""
        with self._watch(files):
            model = self._open_model(files)
            model.warm_up()
        return model

    def _watch(self, files: ModelFiles) -> Watch:
        return UNWATCHED if self._journal is None else self._journal.watch(files.digest(""))

    def _refresh(self) -> None:
        """Another set of the same models: one was loaded or unloaded."""
        self.held = HeldModels(self.held)

    def _switch(self, name: str, models: list[HeldModel]) -> None:
        self.held = HeldModels([*(held for held in self.held if held.model.name != name), *models])

    async def _drain(self, models: Iterable[HeldModel]) -> None:
        for held in models:
            if held.budget is not None and held.resident is not None:
                await held.budget.remove(held.resident)
            await held.batcher.close()


def _remark(held: HeldModel) -> str:
    """What is worth knowing of a model that is held."""
    model = held.model
    if model.not_runnable:
        return f"only runs through the router, step by step: {model.not_runnable}"
    remarks = []
    if held.resident is not None and not held.resident.loaded:
        remarks.append(held.resident.failure or "not in memory: it is loaded when it is asked for")
    if model.cacheable_reason:
        remarks.append(f"not cached: {model.cacheable_reason}")
    return "; ".join(remarks)
