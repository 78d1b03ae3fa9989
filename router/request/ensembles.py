"""Ensembles that no worker runs whole: the router runs the steps one by one, each through the cache."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.tiers.entry import Entry
from router.balancing.catalog import ModelEntry
from services.runtime.errors import InvalidArgumentError, RingmeshError
from services.runtime.oip import ensemble
from services.runtime.oip.ensemble import Plan
from services.runtime.oip.tensors import raw_from_contents
from services.runtime.rpc.rpc import parse

# Parameters copied from the ensemble's request to the requests of its steps.
_PASSED_ON = ("priority", "timeout", "sequence_id", "sequence_start", "sequence_end")


class _StepTensor(NamedTuple):
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


async def run(model: ModelEntry, plan: Plan, data: bytes, infer: Callable[[bytes], Awaitable[Entry]]) -> Entry:
    """Answers a serialized ModelInferRequest that was checked; `infer` answers the serialized requests of the steps.

    Raises InvalidArgumentError for features that need one worker with all steps, and whatever `infer` raises.
    """
    request = parse(v2.ModelInferRequest, data)
    wanted = {output.name for output in request.outputs or model.metadata.outputs}
    if any(output.parameters for output in request.outputs):
        raise InvalidArgumentError(
            f"ensemble {model.name!r} runs on several workers, where outputs take no parameters", field="outputs"
        )
    compute_us = 0

    async def run_step(index: int, inputs: dict[str, _StepTensor]) -> Mapping[str, _StepTensor]:
        nonlocal compute_us
        step = plan.steps[index]
        # Requests all outputs, as most callers of a model do, so that steps and callers share cached answers.
        step_request = v2.ModelInferRequest(model_name=step.model, model_version=step.version)
        for name, tensor in inputs.items():
            step_request.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
            step_request.raw_input_contents.append(tensor.raw)
        for name in _PASSED_ON:
            if name in request.parameters:
                step_request.parameters[name].CopyFrom(request.parameters[name])
        try:
            entry = await infer(step_request.SerializeToString())
        except RingmeshError as error:
            raise error.within(f"step {step.model!r} of ensemble {model.name!r}") from None
        compute_us += entry.compute_us
        answer = v2.ModelInferResponse.FromString(entry.value)
        return {
            output.name: _StepTensor(output.datatype, (*output.shape,), raw)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    tensors = await ensemble.run(plan, _inputs(request, model), run_step)
    response = v2.ModelInferResponse(model_name=model.name, model_version=model.version)
    for output in model.metadata.outputs:
        if output.name in wanted:
            tensor = tensors[output.name]
            response.outputs.add(name=output.name, datatype=tensor.datatype, shape=tensor.shape)
            response.raw_output_contents.append(tensor.raw)
    return Entry(response.SerializeToString(), compute_us)


def _inputs(request: v2.ModelInferRequest, model: ModelEntry) -> dict[str, _StepTensor]:
    """The request's inputs by name. The steps check datatypes and shapes, each for its own model."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise InvalidArgumentError(
            f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs", field="raw_input_contents"
        )
    tensors: dict[str, _StepTensor] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if "shared_memory_region" in tensor.parameters:
            raise InvalidArgumentError(
                f"ensemble {model.name!r} runs on several workers, where no input can be in shared memory",
                field=f"inputs[{index}].parameters",
            )
        raw = raws[index] if raws else raw_from_contents(tensor, f"inputs[{index}]")
        tensors[name] = _StepTensor(tensor.datatype, (*tensor.shape,), raw)
    if missing := [spec.name for spec in model.metadata.inputs if spec.name not in tensors]:
        raise InvalidArgumentError(f"ensemble {model.name!r} also needs input {missing[0]!r}", field="inputs")
    most = model.max_request_rows
    rows = max([tensor.shape[0] for tensor in tensors.values() if tensor.shape], default=0)
    if 0 < most < rows:
        raise InvalidArgumentError(
            f"the request has {rows} rows; ensemble {model.name!r} takes {most} at most, which is its max_batch_size",
            field="inputs",
        )
    return tensors
