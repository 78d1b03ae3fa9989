"""Reads `config.pbtxt`, the configuration of a model in Triton's format."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf import json_format, text_format
from google.protobuf.message import Message
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.repository import config_rules
from services.runtime.oip.absent_model import nearest

ModelConfig = config_pb2.ModelConfig

TENANT_SCOPE = "ringmesh_tenant_scope"
ROW_CACHE = "ringmesh_row_cache"
HEDGE = "ringmesh_hedge"
SEMANTIC_THRESHOLD = "ringmesh_semantic_threshold"
SEMANTIC_EMBEDDING = "ringmesh_semantic_embedding"
CACHE_TTL = "ringmesh_cache_ttl_seconds"
CACHE_STALE = "ringmesh_cache_stale_seconds"
SHARED_TIER = "ringmesh_shared_tier"
# Ringmesh's own parameters with the value "true" or "false".
_FLAGS = frozenset({TENANT_SCOPE, ROW_CACHE, HEDGE, "ringmesh_cache_steps"})
_OURS = _FLAGS | {SEMANTIC_THRESHOLD, SEMANTIC_EMBEDDING, CACHE_TTL, CACHE_STALE, SHARED_TIER}
# How long a sequence without a request is kept, unless the configuration says it.
DEFAULT_IDLE_US = 1_000_000
# The longest time to live: about 30 years.
_MAX_SECONDS = 10**9

_PLATFORMS = ("", "onnxruntime_onnx", "ensemble")
_BACKENDS = ("", "onnxruntime")

# The entries of a model's `parameters` that execution.py reads.
_OF_EXECUTION = frozenset(
    {
        *("intra_op_thread_count", "inter_op_thread_count", "execution_mode", "enable_mem_arena", "enable_mem_pattern"),
        *("memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers", "gpu_mem_limit"),
        *("cudnn_conv_algo_search", "arena_extend_strategy", "do_copy_in_default_stream"),
    }
)

# Parameters of TensorRT: the folders of its caches, which are the worker's.
CACHE_PATHS = frozenset({"trt_engine_cache_path", "trt_timing_cache_path"})

# Paths of the fields that change how a model is served here, or what is reported to callers. A message that is listed
# stands for all of its fields. Any other field that is set is logged at load.
_ACTED_ON = frozenset(
    {
        *("name", "platform", "backend", "version_policy", "max_batch_size", "default_model_filename"),
        *(f"input.{field}" for field in ("name", "data_type", "format", "dims", "reshape", "optional")),
        *(f"output.{field}" for field in ("name", "data_type", "dims", "reshape", "label_filename")),
        *(f"dynamic_batching.{field}" for field in config_pb2.ModelDynamicBatching.DESCRIPTOR.fields_by_name),
        *(f"sequence_batching.{field}" for field in ("max_sequence_idle_microseconds", "control_input", "direct")),
        *(f"sequence_batching.state.{field}" for field in ("input_name", "output_name", "data_type", "dims")),
        "sequence_batching.state.initial_state",
        *(f"sequence_batching.oldest.{field}" for field in ("max_queue_delay_microseconds", "preferred_batch_size")),
        "sequence_batching.oldest.preserve_ordering",
        *(f"ensemble_scheduling.step.{field}" for field in ("model_name", "model_version", "input_map", "output_map")),
        *(f"instance_group.{field}" for field in ("name", "kind", "count", "gpus")),
        *(f"optimization.{field}" for field in ("graph", "cuda.graphs", "execution_accelerators")),
        *("optimization.output_pinned_memory", "model_warmup", "response_cache", "model_transaction_policy.decoupled"),
    }
)
# Messages with at least one field in _ACTED_ON.
_NESTED = frozenset(path[:end] for path in _ACTED_ON for end, letter in enumerate(path) if letter == ".")


# How protobuf reports an unknown field, or an unknown value of an enumeration.
_UNKNOWN = re.compile(r'(Message|Enum) type "([\w.]+)" has no (?:field|value) named "?(\w+)')


class ConfigError(Exception):
    """The configuration cannot be served; the message names the file or field and what it should be."""


NOTHING = ModelConfig()


def parse(text: str, source: str, name: str) -> ModelConfig:
    """Reads protobuf text, or the JSON of a load request. Raises ConfigError with the fault and its place."""
    message = ModelConfig()
    text = text.removeprefix("\N{BYTE ORDER MARK}")
    try:
        if text.lstrip().startswith("{"):
            json_format.Parse(text, message)
        else:
            text_format.Parse(text, message)
    except (text_format.ParseError, json_format.ParseError, ValueError) as error:  # ValueError: the number of an enum
        raise ConfigError(f"{source}: {_with_hint(str(error))}") from None
    _check(message, source, name)
    return message


def _with_hint(message: str) -> str:
    """The first line of protobuf's message, with the nearest name if a field or value is unknown."""
    message = message.splitlines()[0].removesuffix(".")
    if (found := _UNKNOWN.search(message)) is None:
        return message
    pool, (kind, type_name, name) = config_pb2.DESCRIPTOR.pool, found.groups()
    known = (
        pool.FindMessageTypeByName(type_name).fields_by_name
        if kind == "Message"
        else pool.FindEnumTypeByName(type_name).values_by_name
    )
    near = nearest(name, known) or next((one for one in known if one.endswith(f"_{name}")), "")
    return f"{message}; did you mean {near}?" if near else message


def read(path: Path, name: str) -> ModelConfig:
    """The configuration of model `name`; NOTHING if there is no such file. Raises ConfigError."""
    if not path.is_file():
        return NOTHING
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return parse(text, str(path), name)


def ignored_fields(config: ModelConfig) -> list[str]:
    """The paths of the fields that are set but have no effect here, each once."""
    return [path for path, used in fields(config).items() if not used]


def fields(config: ModelConfig) -> dict[str, bool]:
    """The paths of the fields that are set, and whether they have an effect here."""
    # An unknown parameter may be the owner's own, which ModelConfig reports, or it may be misspelt.
    known = _OURS | _OF_EXECUTION
    parameters = {f"parameters.{name}": name in known for name in sorted(config.parameters)}
    accelerators = "optimization.execution_accelerators.gpu_execution_accelerator"
    caches = {
        f"{accelerators}.parameters.{name}": False
        for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator
        for name in sorted(CACHE_PATHS & accelerator.parameters.keys())
    }
    return {path: path in _ACTED_ON for path in _set_fields(config, "")} | parameters | caches


def says(config: ModelConfig, flag: str) -> bool | None:
    return _parameter(config, flag) == "true" if flag in config.parameters else None


def _parameter(config: ModelConfig, name: str, default: str = "") -> str:
    # Without a look, a map would make an entry.
    return config.parameters[name].string_value if name in config.parameters else default


def _number(config: ModelConfig, parameter: str) -> float:
    """The value of a parameter; 0 if it is not given, NaN if it is not a number."""
    try:
        return float(_parameter(config, parameter, "0"))
    except ValueError:
        return math.nan


def serving_rules(config: ModelConfig, *, semantic: bool) -> inference_pb2.ModelVersion:
    """The fields of a ModelVersion that follow from the parameters. `semantic`: similar requests may share answers."""
    rules = inference_pb2.ModelVersion(
        tenant_scoped=says(config, TENANT_SCOPE) is True,
        tenant_shared=says(config, TENANT_SCOPE) is False,
        hedged=says(config, HEDGE) is True,
        ttl_ms=math.ceil(_number(config, CACHE_TTL) * 1000),
        stale_ms=math.ceil(_number(config, CACHE_STALE) * 1000),
        shared_tier=_parameter(config, SHARED_TIER).removeprefix("auto"),
    )
    if semantic and SEMANTIC_THRESHOLD in config.parameters:
        rules.semantic_threshold = _number(config, SEMANTIC_THRESHOLD)
        rules.semantic_embedding = _parameter(config, SEMANTIC_EMBEDDING)
    return rules


def add_defaults(config: ModelConfig) -> None:
    """Adds the values that Triton's NormalizeModelConfig gives to fields that are not set."""
    if not config.HasField("version_policy"):
        config.version_policy.latest.num_versions = 1
    sequences = config.sequence_batching if config.HasField("sequence_batching") else None
    if sequences is not None:
        idle = sequences.max_sequence_idle_microseconds
        sequences.max_sequence_idle_microseconds = idle or DEFAULT_IDLE_US
    batchers = [
        *([config.dynamic_batching] if config.HasField("dynamic_batching") else ()),
        *([sequences.oldest] if sequences is not None and sequences.HasField("oldest") else ()),
    ]
    for batcher in batchers:
        if config.max_batch_size and not batcher.preferred_batch_size:
            batcher.preferred_batch_size.append(config.max_batch_size)
    if not config.HasField("ensemble_scheduling"):
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            if not config.optimization.HasField(memory):
                getattr(config.optimization, memory).enable = True


def batching(config: ModelConfig) -> config_pb2.ModelDynamicBatching:
    """How requests form batches, whether they belong to sequences or not.

    As in Triton, the direct strategy waits only if minimum_slot_utilization is set. Here every such value stands for a
    full batch.
    """
    sequences = config.sequence_batching
    if sequences.HasField("oldest"):
        return config_pb2.ModelDynamicBatching(
            preferred_batch_size=sequences.oldest.preferred_batch_size,
            max_queue_delay_microseconds=sequences.oldest.max_queue_delay_microseconds,
        )
    if sequences.HasField("direct") and sequences.direct.minimum_slot_utilization:
        return config_pb2.ModelDynamicBatching(
            max_queue_delay_microseconds=sequences.direct.max_queue_delay_microseconds
        )
    return config.dynamic_batching


def limits_queue(batching: config_pb2.ModelDynamicBatching) -> bool:
    """Whether a request may fail because the queue is full or the request was queued for too long."""
    reject = config_pb2.ModelQueuePolicy.REJECT
    return any(
        policy.max_queue_size
        or (policy.timeout_action == reject and (policy.default_timeout_microseconds or policy.allow_timeout_override))
        for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values())
    )


def wanted_versions(config: ModelConfig, versions: Iterable[int]) -> list[int]:
    """The versions on disk that the policy selects; the latest if there is no policy."""
    ordered = sorted(versions)
    policy = config.version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return ordered
    if kind == "specific":
        return [version for version in ordered if version in policy.specific.versions]
    return ordered[-(policy.latest.num_versions or 1) :]


def _check(config: ModelConfig, path: str, name: str) -> None:
    if config.name not in ("", name):
        raise ConfigError(
            f"{path}: name is {config.name!r}, but the folder is {name!r}; they are the same or name is left out"
        )
    if config.platform not in _PLATFORMS:
        raise ConfigError(f"{path}: platform is {config.platform!r}; Ringmesh serves onnxruntime_onnx and ensemble")
    if config.backend not in _BACKENDS:
        raise ConfigError(f"{path}: backend is {config.backend!r}; Ringmesh serves onnxruntime")
    for flag in sorted(_FLAGS & config.parameters.keys()):
        if (value := _parameter(config, flag)) not in ("true", "false"):
            raise ConfigError(f'{path}: parameter {flag} is {value!r}; it must be "true" or "false"')
    if (value := _parameter(config, SHARED_TIER, "auto")) not in ("auto", "always", "never"):
        raise ConfigError(f"{path}: parameter {SHARED_TIER} is {value!r}; it must be auto, always or never")
    for parameter, most, wanted in (
        (SEMANTIC_THRESHOLD, 1, "a number above 0, 1 at most"),
        (CACHE_TTL, _MAX_SECONDS, f"a number of seconds above 0, {_MAX_SECONDS} at most"),
        (CACHE_STALE, _MAX_SECONDS, f"a number of seconds above 0, {_MAX_SECONDS} at most"),
    ):
        if parameter in config.parameters and not 0 < _number(config, parameter) <= most:
            value = _parameter(config, parameter)
            raise ConfigError(f"{path}: parameter {parameter} is {value!r}; it must be {wanted}")
    if SEMANTIC_EMBEDDING in config.parameters:
        embedding = _parameter(config, SEMANTIC_EMBEDDING)
        if embedding in ("", name) or SEMANTIC_THRESHOLD not in config.parameters:
            raise ConfigError(
                f"{path}: parameter {SEMANTIC_EMBEDDING} is {embedding!r}; it must be the name of another model, "
                f"beside {SEMANTIC_THRESHOLD}"
            )
    if CACHE_STALE in config.parameters and CACHE_TTL not in config.parameters:
        raise ConfigError(f"{path}: parameter {CACHE_STALE} needs {CACHE_TTL}: what has no end is never stale")
    if fault := next(config_rules.faults(config), None):
        raise ConfigError(f"{path}: {fault}")


def _set_fields(message: Message, prefix: str) -> Iterator[str]:
    for field, value in message.ListFields():
        path = prefix + field.name
        if path in _NESTED:
            for each in value if field.is_repeated else (value,):
                yield from _set_fields(each, path + ".")
        elif path != "parameters":
            yield path
