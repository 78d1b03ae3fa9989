"""The life cycle of models: load, warm up, switch, drain; what is broken leaves what works alone."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from services.inference.execution import execution
from services.inference.execution.inline_runs import InlineRuns
from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.models.decisions import Decision, Decisions, Overrides
from services.inference.models.ensemble import Ensemble
from services.inference.models.held_models import HeldModel, HeldModels
from services.inference.models.memory_budget import MemoryBudget, resident_memory
from services.inference.repository import config, config_rules, repository
from services.inference.repository.config import ConfigError
from services.inference.repository.crash_journal import UNWATCHED, CrashJournal, Watch
from services.inference.repository.repository import (
    Fingerprint,
    ModelFiles,
    ModelSource,
    NoSuchModelError,
    RepositoryError,
    RepositoryUnavailableError,
)
from services.inference.repository.snapshots import Entry, Snapshot, Snapshots
from services.inference.scheduling.batcher import Batcher
from services.inference.scheduling.sequencer import Sequencer
from services.inference.scheduling.statistics import Statistics
from services.runtime.errors import (
    InvalidArgumentError,
    NotFoundError,
    RingmeshError,
    UnavailableError,
)
from services.runtime.machine.machine_fault import machine_fault

log = logging.getLogger(__name__)

READY, UNAVAILABLE = "READY", "UNAVAILABLE"


# Names whose loads failed, and versions of each, that the index tells of; callers choose the names.
MAX_FAILURES = 1000
_MAX_FAILED_VERSIONS = 20
_LONGEST_REASON = 1000
# The reason of what was taken out by request; a caller is told that there is no such model.
_UNLOADED = "unloaded"
_STATE_BYTES = 1 << 30


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
        snapshots: Snapshots | None = None,
        decisions: Decisions | None = None,
    ) -> None:
        """`memory_limit`: bytes of models in memory at once; 0: all that are held. `journal`: of crashes.

        Without `snapshots` or `decisions` they lie in a temporary folder and end with the process.
        """
        self.held = HeldModels([])
        self._source = source
        self._open_model = open_model
        self._executor = executor
        self._journal = journal
        self._quarantined = False
        self._loaded: dict[str, Fingerprint] = {}
        # Of failures that were forgotten for newer ones.
        self.failures_dropped = 0
        self._failures: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._changing = asyncio.Lock()
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="ringmesh-state-") if None in (snapshots, decisions) else None
        )
        folder = Path(self._temporary.name) if self._temporary is not None else Path()
        self._snapshots = snapshots or Snapshots(folder / "snapshots")
        self.decisions = decisions or Decisions(folder / "decisions", _STATE_BYTES)
        self._budget = (
            MemoryBudget(memory_limit, self._open_warm, process_memory, self._refresh) if memory_limit else None
        )

    async def load_all(self) -> None:
        """Loads every model, as it was last decided; what failed is in the index.

        Raises RepositoryError where not one could be, but for those in quarantine and those that were unloaded.
        """
        # Before anything is read: what changes while it loads is seen by the first look.
        self._loaded = await asyncio.to_thread(self._source.fingerprint)
        names = set(await asyncio.to_thread(self._source.names))
        unloaded = False
        for name in sorted(names | self.decisions.decided_ns.keys()):
            decision = await asyncio.to_thread(self.decisions.get, name)
            if decision is not None and not decision.loaded:
                unloaded = True
                self._failed(name, {"": _UNLOADED})
            elif name in names or (decision is not None and decision.overrides.files):
                try:
                    async with self._changing:
                        await self._load(name, decision.overrides if decision is not None else Overrides())
                except RingmeshError as error:
                    log.error("%s", error.message)
                    if isinstance(error, UnavailableError):
                        self._loaded.pop(name, None)  # so that `poll` tries it again
        if not self._quarantined and not unloaded and not any(True for _ in self.held):
            raise RepositoryError("; ".join(reason for failed in self._failures.values() for reason in failed.values()))
        # Last: what the process before left may have been of use.
        await asyncio.to_thread(self._snapshots.sweep)

    async def load(
        self, name: str, overrides: Overrides | None = None, *, pardon: bool = False, decided_ns: int = 0
    ) -> None:
        """Loads a model, or loads it again: what answered goes on until the new one does, and then drains.

        This decides how the model is served, also after a restart, until the next `load` or `unload` of it: with
        `overrides` in place of what the repository has, or without. `decided_ns` tells when the fleet decided it; 0:
        now, for this worker. What was decided later stands. `pardon` ends its quarantine.
        Versions whose files and configuration did not change are kept as they are. Raises InvalidArgumentError with the
        cause, UnavailableError where the files cannot be read or copied, or ResourceExhaustedError where the decision
        cannot be kept; then nothing has changed.
        """
        _check_name(name)
        async with self._changing:
            if not decided_ns or decided_ns > self.decisions.decided_ns.get(name, 0):
                decision = Decision(
                    True, decided_ns or self.decisions.next_ns(name), overrides or Overrides(), fleet=decided_ns > 0
                )
                await self._load(name, decision.overrides, decision=decision, pardon=pardon)

    async def _load(
        self, name: str, overrides: Overrides, *, decision: Decision | None = None, pardon: bool = False
    ) -> None:
        """As `load`; what was decided stays where `decision` is None. `_changing` is held."""
        held = self.held.of(name)
        fresh: list[HeldModel] = []
        failures: dict[str, str] = {}
        lacking = ""
        given: Entry | None = None
        try:
            if overrides.files:
                given = await asyncio.to_thread(self._snapshots.scratch)
            files = await asyncio.to_thread(self._find, name, overrides, given.folder if given is not None else None)
            for version in files:
                try:
                    fresh.append(await self._open(version, held, pardon))
                except ModelLoadError as error:
                    lacks = machine_fault(error)
                    failures[str(version.version)] = f"{error} ({lacks})" if lacks not in str(error) else str(error)
                    lacking = lacking or lacks
            if lacking:
                raise RepositoryUnavailableError("; ".join(failures.values()))
            if failures:
                raise ConfigError("; ".join(failures.values()))
            if decision is not None:
                await asyncio.to_thread(self.decisions.keep, name, decision)
        except (RepositoryError, ConfigError, OSError, RingmeshError) as error:
            # A model that is nowhere did not fail, and neither did one that only the request has.
            is_none = isinstance(error, NoSuchModelError) or (decision is not None and given is not None and not held)
            self._failed(name, {} if is_none else failures or {"": str(error)})
            await self._drain(model for model in fresh if model not in held)
            raise _load_error(name, error) from None
        finally:
            if given is not None:
                await asyncio.to_thread(given.close)
        self._failed(name, {})
        self._switch(name, fresh)
        await self._drain(model for model in held if model not in fresh)
        for model in fresh:
            if model.budget is not None and model.resident is not None:
                await model.budget.load(model.resident)

    async def unload(self, name: str, *, dependents: bool = False, decided_ns: int = 0) -> None:
        """Takes a model out at once, and returns when what it had taken is answered. It stays out until it is loaded.

        `dependents`: the steps of an ensemble go with it. `decided_ns` as in `load`; with it a model that is not held
        may be named. Raises NotFoundError, ResourceExhaustedError where the decision cannot be kept.
        """
        _check_name(name)
        async with self._changing:
            if decided_ns and decided_ns <= self.decisions.decided_ns.get(name, 0):
                return
            held = self.held.of(name)
            if not held and not decided_ns:
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
                decision = Decision(False, decided_ns or self.decisions.next_ns(gone), fleet=decided_ns > 0)
                await asyncio.to_thread(self.decisions.keep, gone, decision)
                await self._take_out(gone)

    async def _take_out(self, name: str, *, deleted: bool = False) -> None:
        held = self.held.of(name)
        self._switch(name, [])
        unloaded = {str(model.model.version): _UNLOADED for model in held} or {"": _UNLOADED}
        self._failed(name, {} if deleted else unloaded)
        await self._drain(held)

    async def poll(self, seconds: float) -> None:
        """Follows the repository: loads what changed, model by model, once it is settled, and unloads what went."""
        before = self._loaded
        served = dict(before)
        while True:
            await asyncio.sleep(seconds)
            now = await asyncio.to_thread(self._source.fingerprint)
            if not now:  # a repository that cannot be read for a moment is not an empty one
                continue
            for name in sorted(now.keys() | served.keys()):
                settled = now.get(name) == before.get(name) != served.get(name)
                if settled and await self._follow(name, name in now):
                    if name in now:
                        served[name] = now[name]
                    else:
                        del served[name]
            before = now

    async def _follow(self, name: str, exists: bool) -> bool:
        """Whether it is done with: a model that is broken is, one that could not be read is tried again."""
        async with self._changing:
            decision = await asyncio.to_thread(self.decisions.get, name)
            try:
                if decision is not None and (not decision.loaded or decision.overrides.files):
                    pass  # the repository has no say
                elif exists:
                    await self._load(name, decision.overrides if decision is not None else Overrides())
                else:
                    await self._take_out(name, deleted=True)
            except RingmeshError as error:
                log.error("%s", error.message)
                return not isinstance(error, UnavailableError)
        return True

    def _failed(self, name: str, reasons: Mapping[str, str]) -> None:
        """Remembers for the index why versions are not served; {}: all are."""
        before = self._failures.pop(name, {})
        if reasons:
            first = [*reasons.items()][:_MAX_FAILED_VERSIONS]
            self._failures[name] = {version: _printable(reason[:_LONGEST_REASON]) for version, reason in first}
            if len(self._failures) > MAX_FAILURES:
                self._failures.popitem(last=False)
                self.failures_dropped += 1
        if before != self._failures.get(name, {}):
            self._refresh()

    async def index(self) -> list[VersionState]:
        """Every model in the repository, loaded or not, by name and version, and what is held without it."""
        try:
            names = set(await asyncio.to_thread(self._source.names))
            # Others that failed or were unloaded have been deleted since.
            failures = {name: self._failures[name] for name in self._failures if name in names | self.decisions.brought}
        except RepositoryError:
            names, failures = set(), dict(self._failures)
        states = {
            (held.model.name, str(held.model.version)): VersionState(
                held.model.name,
                str(held.model.version),
                UNAVAILABLE if held.model.not_runnable or (held.resident and held.resident.failure) else READY,
                _remark(held),
            )
            for held in self.held
        }
        for name, versions in failures.items():
            for version, reason in versions.items():
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

    def shrink(self) -> None:
        """Gives back what large runs left behind; on a thread."""
        for held in self.held:
            if isinstance(held.model, OnnxModel):
                held.model.shrink()

    async def close(self) -> None:
        """Waits for the batches under way."""
        await self._drain(self.held)
        self.decisions.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _find(self, name: str, overrides: Overrides, scratch: Path | None) -> list[ModelFiles]:
        """On a thread. Raises RepositoryError, ConfigError, OSError where `scratch` cannot be written."""
        configured = config.parse(overrides.config, "the config parameter", name) if overrides.config else None
        if scratch is None:
            folder = self._source.fetch(name, configured)
            return repository.versions(folder, name, configured, private=self._source.private)
        if configured is None:
            raise ConfigError("files are given without a config parameter, which they need")
        label_files = {output.label_filename for output in configured.output}
        for path, data in overrides.files.items():
            version, _, file = path.rpartition("/")
            of_labels = path in label_files and not version
            if not (repository.is_version(version) or of_labels) or not repository.is_file_name(file):
                raise ConfigError(f"a file is called {path!r}; it should be <version>/<name>, or a label_filename")
            (scratch / name / version).mkdir(parents=True, exist_ok=True)
            (scratch / name / version / file).write_bytes(data)
        return repository.versions(scratch, name, configured, private=True)

    async def _open(self, files: ModelFiles, held: list[HeldModel], pardon: bool) -> HeldModel:
        """Raises ModelLoadError, RepositoryError."""
        try:
            files = await asyncio.to_thread(files.hashed)
        except OSError as error:
            raise ModelLoadError(f"cannot load {files.model}: cannot read {error.filename}: {error.strerror}") from None
        for kept in held:
            if kept.model.version == files.version and files.digest(kept.model.provider) == kept.model.own_digest:
                return kept
        if ignored := config.ignored_fields(files.config):
            log.warning("model %s/%d: set but not acted on: %s", files.name, files.version, ", ".join(ignored))
        if files.config.HasField("ensemble_scheduling"):
            ensemble = Ensemble(files)
            return HeldModel(ensemble, ensemble, Statistics(ensemble.name, str(ensemble.version)))
        if self._journal is not None:
            digest = files.digest("")
            if pardon:
                self._journal.pardon(digest)
            if reason := self._journal.quarantine(digest):
                self._quarantined = True
                raise ModelLoadError(f"cannot load {files.model}: {reason}")
        snapshot = await asyncio.to_thread(self._snapshots.take, files)
        try:
            return await self._open_snapshot(snapshot, held)
        except BaseException:
            await asyncio.to_thread(snapshot.close)
            raise

    async def _open_snapshot(self, snapshot: Snapshot, held: list[HeldModel]) -> HeldModel:
        files = snapshot.files
        budget, resident = self._budget, None
        if budget is None:
            model = await asyncio.to_thread(self._open_warm, files)
        else:
            resident = await budget.add(files, [kept.resident for kept in held if kept.resident is not None])
            model = resident.model
        made = files.config
        batcher = Batcher(
            model,
            self._executor,
            instances=config_rules.instances(made),
            batching=config.batching(made),
            watch=await asyncio.to_thread(self._watch, files),
            inline=None
            if model.inline_reason
            else InlineRuns(batchable=model.batchable, by_cpu=model.provider == execution.CPU),
        )
        statistics = Statistics(model.name, str(model.version))
        if not made.HasField("sequence_batching"):
            return HeldModel(model, batcher, statistics, budget, resident, snapshot)
        try:
            sequencer = Sequencer(model, batcher, files.folder.parent)
            return HeldModel(model, sequencer, statistics, budget, resident, snapshot)
        except ConfigError as error:
            if budget is not None and resident is not None:
                await budget.remove(resident)
            raise ModelLoadError(f"cannot load {files.origin}: its config.pbtxt {error}") from None

    def _open_warm(self, files: ModelFiles) -> OnnxModel:
        """On a thread. Raises ModelLoadError."""
        try:
            with self._watch(files):
                model = self._open_model(files)
                model.warm_up()
        except ModelLoadError as error:
            # Where the owner of the model finds the file.
            raise ModelLoadError(str(error).replace(str(files.folder), str(files.origin))) from None
        return model

    def _watch(self, files: ModelFiles) -> Watch:
        return UNWATCHED if self._journal is None else self._journal.watch(files.digest(""))

    def _refresh(self) -> None:
        """Another set of the same models: one was loaded into memory or unloaded, or failed to."""
        self._hold(self.held)

    def _switch(self, name: str, models: list[HeldModel]) -> None:
        self._hold([*(held for held in self.held if held.model.name != name), *models])

    def _hold(self, models: Iterable[HeldModel]) -> None:
        reasons = {
            name: {version: reason for version, reason in versions.items() if reason != _UNLOADED}
            for name, versions in self._failures.items()
        }
        self.held = HeldModels(models, {name: versions for name, versions in reasons.items() if versions})

    async def _drain(self, models: Iterable[HeldModel]) -> None:
        for held in models:
            if held.budget is not None and held.resident is not None:
                await held.budget.remove(held.resident)
            await held.batcher.close()
            if held.snapshot is not None:
                await asyncio.to_thread(held.snapshot.close)


def _printable(text: str) -> str:
    """In one line, whatever a file holds that the text quotes."""
    return "".join([letter if letter.isprintable() else " " for letter in text])


def _check_name(name: str) -> None:
    if not repository.is_name(name):
        raise InvalidArgumentError(f"no model can be called {name!r}: it is the name of a folder", field="model_name")


def _load_error(name: str, error: Exception) -> RingmeshError:
    """UnavailableError where the model may be loaded elsewhere or later: the fault is not its own."""
    if isinstance(error, OSError):
        return UnavailableError(f"failed to load {name!r}: cannot write its files: {error.strerror}")
    if isinstance(error, RingmeshError):
        return error
    if isinstance(error, RepositoryUnavailableError) or machine_fault(error):
        return UnavailableError(f"failed to load {name!r}: {error}")
    return InvalidArgumentError(f"failed to load {name!r}: {error}", field="model_name")


def _remark(held: HeldModel) -> str:
    """What is worth knowing of a model that is held."""
    model = held.model
    if isinstance(model, Ensemble) and model.not_runnable:
        routed = "; a router runs its steps one by one if the fleet has them" if model.lacks_steps else ""
        return f"this worker cannot run it whole: {model.not_runnable}{routed}"
    remarks = []
    if held.resident is not None and not held.resident.loaded:
        remarks.append(held.resident.failure or "not in memory: it is loaded when it is asked for")
    if model.cacheable_reason:
        remarks.append(f"not cached: {model.cacheable_reason}")
    if isinstance(model, OnnxModel):
        remarks.append(model.batch_remark)
    return "; ".join(remarks)
