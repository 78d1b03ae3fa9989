"""Validates configurations: the rules of Triton's ValidateModelConfig, and a range for every number in use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

MAX_INSTANCES = 1024
# 7 days.
MAX_MICROSECONDS = 7 * 24 * 3600 * 10**6
# Limit for one input of a warm-up.
MAX_WARMUP_ELEMENTS = 1 << 28

_TIME = (0, MAX_MICROSECONDS)
_INT32, _INT64 = (1 << 31) - 1, (1 << 63) - 1
# Smallest and largest value, by path.
RANGES = {
    "max_batch_size": (0, _INT32),
    "version_policy.latest.num_versions": (0, (1 << 32) - 1),
    "version_policy.specific.versions": (0, _INT64),
    "instance_group.count": (0, MAX_INSTANCES),
    "instance_group.gpus": (0, _INT32),
    "optimization.graph.level": (-1, 2),
    "dynamic_batching.preferred_batch_size": (1, _INT32),
    "dynamic_batching.max_queue_delay_microseconds": _TIME,
    "dynamic_batching.priority_levels": (0, 1024),
    "dynamic_batching.default_priority_level": (0, 1024),
    "dynamic_batching.default_queue_policy.default_timeout_microseconds": _TIME,
    "dynamic_batching.default_queue_policy.max_queue_size": (0, 1_000_000),
    "dynamic_batching.priority_queue_policy.default_timeout_microseconds": _TIME,
    "dynamic_batching.priority_queue_policy.max_queue_size": (0, 1_000_000),
    "sequence_batching.max_sequence_idle_microseconds": _TIME,
    "sequence_batching.direct.max_queue_delay_microseconds": _TIME,
    "sequence_batching.direct.minimum_slot_utilization": (0, 1),
    "sequence_batching.oldest.preferred_batch_size": (1, _INT32),
    "sequence_batching.oldest.max_queue_delay_microseconds": _TIME,
    "ensemble_scheduling.step.model_version": (-1, _INT64),
    "model_warmup.batch_size": (0, _INT32),
    "model_warmup.count": (0, 10_000),
    "model_warmup.inputs.dims": (0, MAX_WARMUP_ELEMENTS),
}
# Sizes of a dimension: 1 or more, or -1 for any.
SIZES = frozenset(
    {
        "input.dims",
        "input.reshape.shape",
        "output.dims",
        "output.reshape.shape",
        "sequence_batching.state.dims",
        "sequence_batching.state.initial_state.dims",
    }
)


def faults(config: config_pb2.ModelConfig) -> Iterator[str]:
    """The faults of a configuration. Each is a sentence that names the field, its value and the allowed values."""
    for path, field, value in _scalars(config, ""):
        if field.enum_type is not None:
            if value not in field.enum_type.values_by_number:
                known = ", ".join(field.enum_type.values_by_name)
                yield f"{path} is {value}; it is one of {known}"
        elif path in SIZES:
            if value < 1 and value != -1:
                yield f"{path} has {value}; a size is 1 or more, or -1 where the request decides it"
        elif path in RANGES:
            low, high = RANGES[path]
            if not low <= value <= high:
                yield f"{path} is {value}; it must be from {low} to {high}"
    yield from _of_tensors(config)
    yield from _of_batching(config)
    yield from _of_instances(config)
    yield from _of_warmup(config)
    yield from _of_ensemble(config)
    if libraries := config.model_operations.op_library_filename:
        yield (
            f"model_operations.op_library_filename names {', '.join(libraries)}; libraries of custom operators are not "
            "loaded, so a model that needs one cannot be served"
        )
    if config.model_transaction_policy.decoupled:
        yield "model_transaction_policy.decoupled is true; ONNX Runtime gives one response a request"


def _of_tensors(config: config_pb2.ModelConfig) -> Iterator[str]:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names = Counter(tensor.name for tensor in tensors)
        for name, count in names.items():
            if count > 1:
                yield f"{kind} {name!r} is there {count} times"
        for tensor in tensors:
            for flag in ("is_shape_tensor", "is_non_linear_format_io"):
                if getattr(tensor, flag):
                    yield f"{kind} {tensor.name!r} has {flag}, which only TensorRT has"
    for tensor in config.input:
        if tensor.format and len(tensor.dims) not in (0, 3):
            kind = config_pb2.ModelInput.Format.Name(tensor.format)
            yield f"input {tensor.name!r} is {kind} with dims {[*tensor.dims]}; it has three, without the batch"
    if ragged := [tensor.name for tensor in config.input if tensor.allow_ragged_batch]:
        yield f"allow_ragged_batch of {', '.join(ragged)} is not served; requests of one shape share a run without it"
    for field in ("batch_input", "batch_output"):
        if targets := [repr(name) for tensor in getattr(config, field) for name in tensor.target_name]:
            yield f"{field} for {', '.join(targets)} is not served; it belongs to ragged batches, which are not either"


def _of_batching(config: config_pb2.ModelConfig) -> Iterator[str]:
    batching, sequences = config.dynamic_batching, config.sequence_batching
    for path, sizes in (
        ("dynamic_batching", batching.preferred_batch_size),
        ("sequence_batching.oldest", sequences.oldest.preferred_batch_size),
    ):
        if beyond := [size for size in sizes if size > config.max_batch_size]:
            limit = config.max_batch_size if config.HasField("max_batch_size") else "not set"
            yield (f"{path}.preferred_batch_size is {beyond[0]}; it must be from 1 to max_batch_size, which is {limit}")
    levels = batching.priority_levels
    if not (1 if levels else 0) <= batching.default_priority_level <= levels:
        yield f"default_priority_level is {batching.default_priority_level}; " + (
            f"it must be from 1 to priority_levels, {levels}" if levels else "it needs priority_levels"
        )
    if beyond := [level for level in batching.priority_queue_policy if not 1 <= level <= levels]:
        yield f"priority_queue_policy is for levels {sorted(beyond)}; priority_levels has 1 to {levels}"
    if batching.preserve_ordering:
        policies = (batching.default_queue_policy, *batching.priority_queue_policy.values())
        if levels > 1:
            yield f"preserve_ordering goes with 1 priority level, not with {levels}"
        if any(p.default_timeout_microseconds and p.timeout_action == p.DELAY for p in policies):
            yield "preserve_ordering does not go with the timeout_action DELAY"
    if sequences.iterative_sequence:
        yield "iterative_sequence is not served: ONNX Runtime gives one response a request"
    if config.HasField("sequence_batching") and config.response_cache.enable:
        yield "response_cache does not go with sequence_batching: an answer depends on what came before"


def _of_instances(config: config_pb2.ModelConfig) -> Iterator[str]:
    for group in config.instance_group:
        if group.gpus and group.kind in (group.KIND_CPU, group.KIND_MODEL):
            yield f"instance_group {group.name!r} has gpus and is {group.Kind.Name(group.kind)}; gpus go with KIND_GPU"
        if group.profile:
            yield f"instance_group {group.name!r} has profile, which only TensorRT models have"
    if (total := instances(config)) > MAX_INSTANCES:
        yield f"instance_group asks for {total} instances; all groups together have {MAX_INSTANCES} at most"


def _of_warmup(config: config_pb2.ModelConfig) -> Iterator[str]:
    for sample in config.model_warmup:
        if config.HasField("max_batch_size") and sample.batch_size > max(1, config.max_batch_size):
            most = max(1, config.max_batch_size)
            yield f"model_warmup {sample.name!r} has batch_size {sample.batch_size}; max_batch_size lets it have {most}"
        for name, tensor in sample.inputs.items():
            if (elements := math.prod(tensor.dims) * max(1, sample.batch_size)) > MAX_WARMUP_ELEMENTS:
                yield (
                    f"model_warmup {sample.name!r} gives {name!r} {elements} elements; it has {MAX_WARMUP_ELEMENTS} "
                    "at most"
                )


def _of_ensemble(config: config_pb2.ModelConfig) -> Iterator[str]:
    if config.HasField("ensemble_scheduling") != (config.platform == "ensemble"):
        yield 'platform "ensemble" and ensemble_scheduling go together; one of them is missing'
    if not config.HasField("ensemble_scheduling"):
        return
    if wrong := [name for name in ("instance_group", "model_warmup", "backend") if getattr(config, name)]:
        yield f"{wrong[0]} is set; an ensemble has none, its steps do"
    if config.HasField("optimization"):
        yield "optimization is set; an ensemble has none, its steps do"
    if not config.ensemble_scheduling.step:
        yield "ensemble_scheduling has no step"
    for index, step in enumerate(config.ensemble_scheduling.step):
        if missing := [name for name in ("model_name", "input_map", "output_map") if not getattr(step, name)]:
            yield f"ensemble_scheduling.step[{index}] has no {missing[0]}"


def instances(config: config_pb2.ModelConfig) -> int:
    """The number of instances, that is, of concurrent runs, over all groups."""
    return sum((group.count or 1) * (len(group.gpus) or 1) for group in config.instance_group) or 1


def _scalars(message: Message, prefix: str) -> Iterator[tuple[str, FieldDescriptor, Any]]:
    """Every scalar field that is set, with its path. Paths contain no map keys and no indices."""
    for field, value in message.ListFields():
        path = prefix + field.name
        if field.message_type is None:
            for each in value if field.is_repeated else (value,):
                yield path, field, each
            continue
        if field.message_type.GetOptions().map_entry:
            value = value.values()
        for each in value if field.is_repeated else (value,):
            if isinstance(each, Message):
                yield from _scalars(each, path + ".")
