"""Ensembles on a worker: if it holds all steps, they run as one model, and their tensors stay in the process."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from services.inference.codec.request import Decoded, prepare
from services.inference.codec.tensor_spec import TensorSpec, declared_spec
from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.repository.config import SHARED_TIER, ConfigError, ModelConfig, add_defaults, serving_rules
from services.inference.repository.repository import ModelFiles
from services.inference.scheduling.batcher import BatchResult, StepResult
from services.inference.scheduling.statistics import Statistics
from services.runtime.errors import FailedPreconditionError, NotFoundError, RingmeshError, UnavailableError
from services.runtime.oip import ensemble
from services.runtime.oip.ensemble import EnsembleError
from services.runtime.verdict import Verdict

Array = npt.NDArray[Any]


class HeldStep(Protocol):
    """A step of an ensemble; HeldModel implements it."""

    @property
    def model(self) -> OnnxModel | Ensemble:
        """The model version."""

    @property
    def statistics(self) -> Statistics:
        """The statistics of the model version."""

    def submit(self, decoded: Decoded, deadline: float | None) -> Awaitable[BatchResult]:
        """Runs a request."""


class Ensemble:
    """One version of an ensemble, with the interfaces of a model and of a batcher.

    `runnable`: its reason names a step that is missing or does not fit. `lacks_steps`: steps are missing
    here, so the ensemble may run on workers that have them.
    """

    provider = platform = "ensemble"
    limits_queue = False
    row_cache = Verdict("its steps cache their own")
    batch_remark = "batched by its steps"
    # Requests wait in the queues of the steps.
    waiting = 0

    def __init__(self, files: ModelFiles) -> None:
        """Raises ModelLoadError."""
        self.name = files.name
        self.version = files.version
        self._config = files.config
        where = f"cannot load {files.folder.parent}: its config.pbtxt"
        self.max_request_rows = self._config.max_batch_size
        self.max_batch_rows = max(1, self.max_request_rows)
        self.has_rows = self.max_request_rows > 0
        try:
            self.inputs = {t.name: declared_spec(t, self.has_rows) for t in self._config.input}
            self.outputs = {t.name: declared_spec(t, self.has_rows) for t in self._config.output}
            self.plan = ensemble.plan(self._config.ensemble_scheduling, self.inputs, self.outputs)
        except (ConfigError, EnsembleError) as error:
            raise ModelLoadError(f"{where}: {error}") from None
        self.required = tuple(self.inputs)
        self._own_labels = dict(files.labels)
        self.labels: Mapping[str, Sequence[bytes]] = self._own_labels
        self.rules = serving_rules(self._config, semantic=False)
        self.own_digest = self.digest = files.digest("ensemble")
        self.runnable = self.cacheable = Verdict("its steps are not known yet")
        self.lacks_steps = True
        self._steps: list[HeldStep] = []

    def resolved(self, find: Callable[[str, str], HeldStep]) -> Ensemble:
        """This ensemble with its steps looked up by `find(name, version)`, which behaves as HeldModels.find."""
        made = object.__new__(Ensemble)
        made.__dict__.update(self.__dict__)
        made._steps = []
        for step in self.plan.steps:
            try:
                made._steps.append(find(step.model, step.version))
            except (NotFoundError, UnavailableError) as error:
                made._steps, made.runnable = [], _without_step(step.model, error)
                break
        made.lacks_steps = not made._steps
        if made._steps:
            made.runnable = made._fits()
        made.limits_queue = any(step.model.limits_queue for step in made._steps)
        # As in Triton, an output without labels of its own has those of the step that makes it.
        made.labels = {
            tensor: held.model.labels[output]
            for step, held in zip(made.plan.steps, made._steps, strict=False)
            for output, tensor in step.outputs.items()
            if tensor in made.outputs and output in held.model.labels
        } | self._own_labels
        made.digest = ensemble.digest(self.own_digest, (step.model.digest for step in made._steps))
        cached = ((step.model.name, step.model.cacheable) for step in made._steps)
        made.cacheable = made.runnable and ensemble.cacheable(self._config, cached)
        return made

    def config(self) -> ModelConfig:
        made = ModelConfig()
        made.CopyFrom(self._config)
        made.name, made.platform = self.name, self.platform
        add_defaults(made)
        made.parameters[SHARED_TIER].string_value = self.rules.shared_tier or "auto"
        made.parameters["ringmesh_cached"].string_value = str(self.cacheable)
        return made

    async def submit(self, decoded: Decoded, deadline: float | None) -> BatchResult:
        """Runs the steps, each in batches of its model. Raises the errors of the steps, with the step's name."""
        if not self.runnable:
            raise FailedPreconditionError(f"ensemble {self.name!r} cannot run on this worker: {self.runnable.reason}")
        start = time.monotonic_ns()
        steps: list[StepResult] = []

        async def run_step(index: int, inputs: dict[str, Array]) -> Mapping[str, Array]:
            held, begun = self._steps[index], time.monotonic_ns()
            outputs = tuple([name for name in held.model.outputs if name in self.plan.steps[index].outputs])
            try:
                step = prepare(inputs, held.model, outputs, decoded)
                batch = await held.submit(step, deadline)
            except RingmeshError as error:
                held.statistics.failed(time.monotonic_ns() - begun, error.kind)
                raise error.within(f"step {held.model.name!r} of ensemble {self.name!r}") from None
            now = time.monotonic_ns()
            held.statistics.succeeded(batch, step.rows, now - begun, now - batch.end_ns)
            assert isinstance(held.model, OnnxModel)  # checked by `resolved`
            steps.append(StepResult(held.model, begun, now, batch))
            return dict(zip(outputs, batch.arrays, strict=True))

        tensors = await ensemble.run(self.plan, decoded.arrays, run_step)
        arrays = [tensors[name] for name in decoded.outputs]
        share_us = sum([step.batch.share_us for step in steps])
        return BatchResult(
            arrays, start, start, start, time.monotonic_ns(), 1, decoded.rows, True, share_us, steps=steps
        )

    async def close(self) -> None:
        """Does nothing: the ensemble has no queue. Requests of its steps are drained with the steps."""

    def _fits(self) -> Verdict:
        signatures = [
            ensemble.Signature(
                _datatypes(step.model.inputs),
                step.model.required,
                _datatypes(step.model.outputs),
                isinstance(step.model, Ensemble),
            )
            for step in self._steps
        ]
        return ensemble.fits(self.plan, _datatypes(self.inputs), _datatypes(self.outputs), signatures)


def _without_step(name: str, error: RingmeshError) -> Verdict:
    """Why an ensemble cannot run without the step `name`, from the error of looking it up."""
    if isinstance(error, NotFoundError) and error.field == "model_name":
        _, found, near = error.message.rpartition("; did you mean ")
        return Verdict(f"its step {name!r} is not loaded{found}{near if found else ''}")
    return Verdict(f"step {name!r}: {error.message}")


def _datatypes(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    return {name: spec.datatype.name for name, spec in specs.items()}
