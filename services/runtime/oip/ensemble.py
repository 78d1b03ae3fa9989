"""Ensembles: models whose tensors flow into one another, called as one. Workers and routers share this code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from blake3 import blake3
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.runtime.errors import some
from services.runtime.verdict import YES, Verdict

Tensor = TypeVar("Tensor")


class EnsembleError(Exception):
    """The steps do not form a valid graph; the message says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """A model of the ensemble. `inputs` and `outputs` map the model's tensor names to the ensemble's.

    `version` is "" for the latest.
    """

    model: str
    version: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in topological order; `needs` has, for each step, the indices of the steps that it depends on."""

    steps: Sequence[Step]
    needs: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Signature:
    """The datatypes of a model's inputs and outputs, by name; `required` names its mandatory inputs."""

    inputs: Mapping[str, str]
    required: Collection[str]
    outputs: Mapping[str, str]
    is_ensemble: bool


def plan(scheduling: config_pb2.ModelEnsembling, inputs: Iterable[str], outputs: Iterable[str]) -> Plan:
    """Plans the steps of a configuration with these inputs and outputs. Raises EnsembleError."""
    steps = [
        Step(
            step.model_name,
            str(step.model_version) if step.model_version > 0 else "",
            dict(step.input_map),
            dict(step.output_map),
        )
        for step in scheduling.step
    ]
    maker: dict[str, int | None] = dict.fromkeys(inputs)
    for index, step in enumerate(steps):
        for tensor in step.outputs.values():
            if tensor in maker:
                raise EnsembleError(f"tensor {tensor!r} is made twice; step {step.model!r} may not make it again")
            maker[tensor] = index
    needs: dict[int, set[int]] = {}
    for index, step in enumerate(steps):
        for tensor in step.inputs.values():
            if tensor not in maker:
                raise EnsembleError(f"step {step.model!r} takes tensor {tensor!r}, which nothing makes")
        needs[index] = {made for tensor in step.inputs.values() if (made := maker[tensor]) is not None}
    for tensor in outputs:
        if maker.get(tensor) is None:
            raise EnsembleError(f"output {tensor!r} is not made by any step")
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = " -> ".join(steps[index].model for index in error.args[1])
        raise EnsembleError(f"the steps wait for one another: {names}") from None
    position_of = {index: position for position, index in enumerate(order)}
    return Plan(
        [steps[index] for index in order],
        [sorted(position_of[needed] for needed in needs[index]) for index in order],
    )


def fits(whole: Plan, inputs: Mapping[str, str], outputs: Mapping[str, str], models: Sequence[Signature]) -> Verdict:
    """Whether the models fit the plan. `inputs` and `outputs` are the ensemble's."""
    types = dict(inputs)
    for step, model in zip(whole.steps, models, strict=True):
        if model.is_ensemble:
            return Verdict(f"step {step.model!r} is an ensemble; a step must be a model")
        if wrong := [name for name in step.inputs if name not in model.inputs]:
            return Verdict(f"step {step.model!r} has no input {wrong[0]!r}; it has: {some(model.inputs)}")
        if missing := [name for name in model.required if name not in step.inputs]:
            return Verdict(f"step {step.model!r} also needs input {missing[0]!r}")
        if wrong := [name for name in step.outputs if name not in model.outputs]:
            return Verdict(f"step {step.model!r} has no output {wrong[0]!r}; it has: {some(model.outputs)}")
        for name, tensor in step.inputs.items():
            if types[tensor] != model.inputs[name]:
                return Verdict(
                    f"step {step.model!r} takes {name!r} as {model.inputs[name]}, and tensor {tensor!r} is "
                    f"{types[tensor]}"
                )
        types |= {tensor: model.outputs[name] for name, tensor in step.outputs.items()}
    for name, datatype in outputs.items():
        if types[name] != datatype:
            return Verdict(f"output {name!r} is {types[name]}, and its config.pbtxt says {datatype}")
    return YES


async def run(
    whole: Plan,
    given: Mapping[str, Tensor],
    run_step: Callable[[int, dict[str, Tensor]], Awaitable[Mapping[str, Tensor]]],
) -> dict[str, Tensor]:
    """Runs the steps and returns all tensors of the ensemble. Independent steps run concurrently; a failure ends all.

    `run_step` takes the index of a step and its model's inputs, and returns the outputs, by the model's names.
    """
    tensors = dict(given)
    tasks: list[asyncio.Task[None]] = []

    async def run_one(index: int) -> None:
        step = whole.steps[index]
        for needed in whole.needs[index]:
            await tasks[needed]
        made = await run_step(index, {name: tensors[tensor] for name, tensor in step.inputs.items()})
        for name, tensor in step.outputs.items():
            tensors[tensor] = made[name]

    try:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(run_one(index)) for index in range(len(whole.steps)))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return tensors


def digest(own: bytes, steps: Iterable[bytes]) -> bytes:
    """Returns a digest of 16 bytes over the ensemble's own digest and those of its steps, in the order of its plan."""
    hasher = blake3(own)
    for step in steps:
        hasher.update(step)
    return hasher.digest(16)


def cacheable(config: config_pb2.ModelConfig, steps: Iterable[tuple[str, Verdict]]) -> Verdict:
    """Whether an ensemble's answers are cached. `steps`: the name of each, and whether its answers are."""
    if config.HasField("response_cache"):
        return YES if config.response_cache.enable else Verdict("its config.pbtxt says so")
    return next((Verdict(f"of its step {name!r}: {cached.reason}") for name, cached in steps if not cached), YES)
