"""The life cycle of models: load, warm up, switch, drain. A model that fails to load does not affect others."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.execution import execution
from services.inference.execution.inline_runs import InlineRuns
from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.models.decisions import Decision, Decisions, Overrides
from services.inference.models.ensemble import Ensemble
from services.inference.models.held_models import HeldModel, HeldModels
from services.inference.models.memory_budget import MemoryBudget, resident_memory
from services.inference.repository import config, repository
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
from services.inference.repository.signatures import Signatures, UnsignedError
from services.inference.repository.snapshots import LockedFolder, Snapshot, Snapshots
from services.inference.scheduling.batcher import Batcher
from services.inference.scheduling.sequencer import Sequencer
from services.inference.scheduling.statistics import Statistics
from services.runtime.errors import InvalidArgumentError, NotFoundError, RingmeshError, UnavailableError
from services.runtime.machine.machine_fault import machine_fault

log = logging.getLogger(__name__)

READY, UNAVAILABLE = "READY", "UNAVAILABLE"
# Limits on the names with failed loads, and on the versions of each, in the index, because callers choose the names.
MAX_FAILURES = 1000
_MAX_FAILED_VERSIONS = 20
_LONGEST_REASON = 1000
# The reason of models unloaded by request. Callers are told that there is no such model.
_UNLOADED = "unloaded"
_STATE_BYTES = 1 << 30


class ModelStore:
    """The models of a repository, and those that are held. Only this class replaces `held`.

    `open_model` makes an OnnxModel from files. It takes long, so it runs on a thread.
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
        signatures: Signatures | None = None,
        suggests: bool = True,
    ) -> None:
        """`memory_limit`: bytes of models in memory at once; 0: no limit. `journal`: the crash journal. `signatures`:
        checks each version; None: models need no signature. `suggests`: errors may name a model with a similar name.

        If `snapshots` or `decisions` are None, they are kept in a temporary folder and lost with the process.
        """
        self.held = HeldModels([])
        # Set by the first model that can run, or once `load_all` is through and no failure is left. Never cleared.
        self.usable = asyncio.Event()
        self._started = False
        self._source = source
        self._open_model = open_model
        self._executor = executor
        self._journal = journal
        self._signatures = signatures
        self._suggests = suggests
        self._loaded: dict[str, Fingerprint] = {}
        # The number of failures dropped to make room for newer ones.
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
        """Loads every model according to the last decision on it. The index lists those that failed.

        Raises RepositoryError if the repository cannot be read or has no model.
        """
        # Taken before anything is read, so that the first poll sees changes made during the load.
        self._loaded = await asyncio.to_thread(self._source.fingerprint)
        names = set(await asyncio.to_thread(self._source.names))
        for name in sorted(names | self.decisions.decided_ns.keys()):
            decision = await asyncio.to_thread(self.decisions.get, name)
            if decision is not None and not decision.loaded:
                self._failed(name, {"": _UNLOADED})
            elif name in names or (decision is not None and decision.overrides.files):
                try:
                    async with self._changing:
                        await self._load(name, decision.overrides if decision is not None else Overrides())
                except RingmeshError as error:
                    log.error("%s", error.message)
                    if isinstance(error, UnavailableError):
                        self._loaded.pop(name, None)  # so that `poll` tries it again
        self._started = True
        self._refresh()
        # Swept last: the load may have used snapshots that the previous process left.
        await asyncio.to_thread(self._snapshots.sweep)

    async def load(
        self, name: str, overrides: Overrides | None = None, *, pardon: bool = False, decided_ns: int = 0
    ) -> None:
        """Loads or reloads a model. The old versions answer until the new ones are ready, and then drain.

        The decision applies until the next `load` or `unload` of the model, also after a restart. `overrides` replace
        the repository's files. `decided_ns`: time at which the fleet decided; 0: decided now, for this worker only. A
        later decision takes precedence. `pardon` ends the quarantine of the model. Versions with unchanged files and
        configuration stay loaded. Raises InvalidArgumentError with the cause, UnavailableError if the files cannot be
        read or copied, and ResourceExhaustedError if the decision cannot be stored; nothing has changed then.
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
        """As `load`. If `decision` is None, the stored decision stays. The caller holds `_changing`."""
        held = self.held.of(name)
        fresh: list[HeldModel] = []
        failures: dict[str, str] = {}
        lacking = ""
        given: LockedFolder | None = None
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
        except Exception as error:
            await self._drain(model for model in fresh if model not in held)
            if not isinstance(error, (RepositoryError, ConfigError, OSError, RingmeshError)):
                raise
            # Models that do not exist, and models that only this request provides, are not listed as failed.
            is_none = isinstance(error, NoSuchModelError) or (decision is not None and given is not None and not held)
            self._failed(name, {} if is_none else failures or {"": str(error)})
            raise _load_error(name, error) from None
        finally:
            if given is not None:
                await asyncio.to_thread(given.close)
        self._failed(name, {})
        self._switch(name, fresh)
        await self._drain(model for model in held if model not in fresh)
        for model in fresh:
            if model.resident is not None:
                await model.resident.budget.load(model.resident)

    async def unload(self, name: str, *, dependents: bool = False, decided_ns: int = 0) -> None:
        """Removes a model immediately, and returns when its requests are answered. It stays unloaded until `load`.

        `dependents`: also unloads the steps of an ensemble. `decided_ns`: as in `load`; if it is set, the model need
        not be held. Raises NotFoundError, and ResourceExhaustedError if the decision cannot be stored.
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
                if decided_ns and decided_ns <= self.decisions.decided_ns.get(gone, 0):
                    continue
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
        """Follows the repository. Loads each model that changed, once two polls agree, and unloads deleted models."""
        before = self._loaded
        served = dict(before)
        while True:
            await asyncio.sleep(seconds)
            try:
                now = await asyncio.to_thread(self._source.fingerprint)
            except RepositoryError:  # it cannot be read at the moment
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
        """Applies a change of the repository. Returns False if the model could not be read and is to be tried again."""
        async with self._changing:
            decision = await asyncio.to_thread(self.decisions.get, name)
            try:
                if decision is not None and (not decision.loaded or decision.overrides.files):
                    pass  # the decision overrides the repository
                elif exists:
                    await self._load(name, decision.overrides if decision is not None else Overrides())
                else:
                    await self._take_out(name, deleted=True)
            except RingmeshError as error:
                log.error("%s", error.message)
                return not isinstance(error, UnavailableError)
        return True

    def _failed(self, name: str, reasons: Mapping[str, str]) -> None:
        """Records for the index why versions are not served; {}: all are served."""
        before = self._failures.pop(name, {})
        if reasons:
            first = [*reasons.items()][:_MAX_FAILED_VERSIONS]
            self._failures[name] = {version: _printable(reason[:_LONGEST_REASON]) for version, reason in first}
            if len(self._failures) > MAX_FAILURES:
                self._failures.popitem(last=False)
                self.failures_dropped += 1
        if before != self._failures.get(name, {}):
            self._refresh()

    async def index(self) -> list[v2.RepositoryIndexResponse.ModelIndex]:
        """All models of the repository, loaded or not, and the held models that it lacks, by name and version.

        READY has remarks as its reason, UNAVAILABLE the cause.
        """
        line = v2.RepositoryIndexResponse.ModelIndex
        try:
            names = set(await asyncio.to_thread(self._source.names))
            # Other models that failed or were unloaded have been deleted from the repository.
            failures = {name: self._failures[name] for name in self._failures if name in names | self.decisions.brought}
        except RepositoryError:
            names, failures = set(), dict(self._failures)
        lines = {}
        for held in self.held:
            name, version = held.model.name, str(held.model.version)
            failed = not held.model.runnable or (held.resident and held.resident.failure)
            state = UNAVAILABLE if failed else READY
            lines[name, version] = line(name=name, version=version, state=state, reason=_remark(held))
        for name, versions in failures.items():
            for version, reason in versions.items():
                known = lines.get((name, version))
                if known is not None and known.state == READY:
                    known.reason = f"the new files are not served: {reason}"
                else:
                    lines[name, version] = line(name=name, version=version, state=UNAVAILABLE, reason=reason)
        for name in names - {name for name, _ in lines}:
            lines[name, ""] = line(name=name, state=UNAVAILABLE, reason="not loaded")
        return [lines[key] for key in sorted(lines)]

    def shrink(self) -> None:
        """On a thread: frees memory that large runs left allocated."""
        for held in self.held:
            if isinstance(held.model, OnnxModel):
                held.model.shrink()

    async def close(self) -> None:
        await self._drain(self.held)
        self.decisions.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _find(self, name: str, overrides: Overrides, scratch: Path | None) -> list[ModelFiles]:
        """On a thread. Raises RepositoryError, ConfigError, and OSError if `scratch` cannot be written."""
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
        """Opens a version, or returns the held one if it is unchanged. Raises ModelLoadError, RepositoryError."""
        try:
            files = await asyncio.to_thread(files.hashed)
        except OSError as error:
            raise ModelLoadError(f"cannot load {files.model}: cannot read {error.filename}: {error.strerror}") from None
        for kept in held:
            if kept.model.version == files.version and files.digest(kept.model.provider) == kept.model.own_digest:
                return kept
        if self._signatures is not None:
            try:
                await asyncio.to_thread(self._signatures.check, files)
            except UnsignedError as error:
                raise ModelLoadError(f"cannot load {files.origin}: {error}") from None
        if ignored := config.ignored_fields(files.config):
            log.warning("model %s/%d: set but not acted on: %s", files.name, files.version, ", ".join(ignored))
        if files.config.HasField("ensemble_scheduling"):
            ensemble = Ensemble(files)
            return HeldModel(ensemble, ensemble, Statistics(ensemble.name, str(ensemble.version)))
        if self._journal is not None:
            digest = files.digest("")
            if pardon:
                self._journal.pardon(digest)
            if not (verdict := self._journal.allows(digest)):
                raise ModelLoadError(f"cannot load {files.model}: {verdict.reason}")
        snapshot = await asyncio.to_thread(self._snapshots.take, files)
        try:
            return await self._open_snapshot(snapshot, held)
        except BaseException:
            await asyncio.to_thread(snapshot.close)
            raise

    async def _open_snapshot(self, snapshot: Snapshot, held: list[HeldModel]) -> HeldModel:
        files = snapshot.files
        resident = None
        if self._budget is None:
            model = await asyncio.to_thread(self._open_warm, files)
        else:
            resident = await self._budget.add(files, [kept.resident for kept in held if kept.resident is not None])
            model = resident.model
        try:
            batcher = await self._batcher(model, files)
        except BaseException as error:
            if resident is not None:
                await resident.budget.remove(resident)
            if isinstance(error, ConfigError):
                raise ModelLoadError(f"cannot load {files.origin}: its config.pbtxt {error}") from None
            raise
        return HeldModel(model, batcher, Statistics(model.name, str(model.version)), resident, snapshot)

    async def _batcher(self, model: OnnxModel, files: ModelFiles) -> Batcher | Sequencer:
        """Raises ConfigError."""
        batcher = Batcher(
            model,
            self._executor,
            instances=model.concurrent_runs,
            batching=config.batching(files.config),
            watch=await asyncio.to_thread(self._watch, files),
            inline=InlineRuns(batchable=bool(model.batchable), by_cpu=model.provider == execution.CPU)
            if model.inline
            else None,
        )
        if not files.config.HasField("sequence_batching"):
            return batcher
        return Sequencer(model, batcher, files.folder.parent)

    def _open_warm(self, files: ModelFiles) -> OnnxModel:
        """On a thread: opens a model and runs its warm-up. Raises ModelLoadError."""
        try:
            with self._watch(files):
                model = self._open_model(files)
                model.warm_up()
        except ModelLoadError as error:
            # Names the path where the owner of the model finds the file.
            raise ModelLoadError(str(error).replace(str(files.folder), str(files.origin))) from None
        return model

    def _watch(self, files: ModelFiles) -> Watch:
        return UNWATCHED if self._journal is None else self._journal.watch(files.digest(""))

    def _refresh(self) -> None:
        """Replaces `held` by a new set of the same models, after a model's state or failures changed."""
        self._hold(self.held)

    def _switch(self, name: str, models: list[HeldModel]) -> None:
        self._hold([*(held for held in self.held if held.model.name != name), *models])

    def _hold(self, models: Iterable[HeldModel]) -> None:
        reasons = {
            name: {version: reason for version, reason in versions.items() if reason != _UNLOADED}
            for name, versions in self._failures.items()
        }
        failures = {name: versions for name, versions in reasons.items() if versions}
        self.held = HeldModels(models, failures, suggests=self._suggests)
        if any(held.model.runnable for held in self.held) or (self._started and not self.held.failures):
            self.usable.set()

    async def _drain(self, models: Iterable[HeldModel]) -> None:
        for held in models:
            if held.resident is not None:
                await held.resident.budget.remove(held.resident)
            await held.batcher.close()
            if held.snapshot is not None:
                await asyncio.to_thread(held.snapshot.close)


def _printable(text: str) -> str:
    """The text without control characters, which a quoted file may contain."""
    return "".join([letter if letter.isprintable() else " " for letter in text])


def _check_name(name: str) -> None:
    if not repository.is_name(name):
        raise InvalidArgumentError(f"no model can be called {name!r}: it is the name of a folder", field="model_name")


def _load_error(name: str, error: Exception) -> RingmeshError:
    """The error for a failed load. UnavailableError if the fault is not the model's, so a load may succeed elsewhere or
    later."""
    if isinstance(error, OSError):
        return UnavailableError(f"failed to load {name!r}: cannot write its files: {error.strerror}")
    if isinstance(error, RingmeshError):
        return error
    if isinstance(error, NoSuchModelError):
        return NotFoundError(f"failed to load {name!r}: {error}", field="model_name")
    if isinstance(error, RepositoryUnavailableError) or machine_fault(error):
        return UnavailableError(f"failed to load {name!r}: {error}")
    return InvalidArgumentError(f"failed to load {name!r}: {error}", field="model_name")


def _remark(held: HeldModel) -> str:
    model = held.model
    if isinstance(model, Ensemble) and not model.runnable:
        routed = "; a router runs its steps one by one if the fleet has them" if model.lacks_steps else ""
        return f"this worker cannot run it whole: {model.runnable.reason}{routed}"
    remarks = []
    if held.resident is not None and not held.resident.loaded:
        remarks.append(held.resident.failure or "not in memory: it is loaded when it is asked for")
    if not model.cacheable:
        remarks.append(f"not cached: {model.cacheable.reason}")
    if isinstance(model, OnnxModel):
        remarks.append(model.batch_remark)
    return "; ".join(remarks)
