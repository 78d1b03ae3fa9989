"""Chooses execution providers and session options from a model's configuration and the providers of this machine.

The names in config.pbtxt are those of Triton's onnxruntime backend. ONNX Runtime's pages on its CUDA and TensorRT
execution providers explain them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnxruntime
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.repository.config import CACHE_PATHS, ConfigError, ModelConfig
from services.inference.repository.config_rules import instances

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
ON_GPU = (CUDA, TENSORRT)

_GRAPH_LEVELS = {
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# Triton's names of TensorRT options. All other options have ONNX Runtime's names.
_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_TENSORRT_PRECISIONS = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "BF16": {"trt_bf16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}
# A configuration may come from a caller, so it may set only options that name no file, library or address in memory.
_TENSORRT_OPTIONS = frozenset(
    f"trt_{name}"
    for name in (
        *("max_workspace_size", "max_partition_iterations", "min_subgraph_size", "op_types_to_exclude"),
        *("fp16_enable", "bf16_enable", "int8_enable", "int8_use_native_calibration_table", "layer_norm_fp32_fallback"),
        *("dla_enable", "dla_core", "sparsity_enable", "tactic_sources", "auxiliary_streams", "preview_features"),
        *("engine_cache_enable", "engine_hw_compatible", "timing_cache_enable", "force_timing_cache"),
        *("force_sequential_engine_build", "context_memory_sharing_enable", "cuda_graph_enable"),
        *("build_heuristics_enable", "builder_optimization_level", "detailed_build_log"),
        *("profile_min_shapes", "profile_max_shapes", "profile_opt_shapes"),
    )
)
_CUDA_OPTIONS = frozenset(
    {
        *("gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream", "use_ep_level_unified_stream"),
        *("cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d", "fuse_conv_bias"),
        *("tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms", "sdpa_kernel"),
        *("enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "prefer_nhwc", "use_tf32"),
    }
)
_OPENVINO_OPTIONS = frozenset(
    {
        *("device_type", "precision", "num_of_threads", "num_streams", "model_priority", "enable_opencl_throttling"),
        *("enable_qdq_optimizer", "disable_dynamic_shapes", "reshape_input", "layout"),
    }
)
# Options of the CUDA provider that Triton also accepts in the model's `parameters`, as indices of these values.
_CUDA_PARAMETERS = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "do_copy_in_default_stream": ("0", "1"),
}
# The allowed numbers of threads of one run. ONNX Runtime would start any number, even one given by mistake.
_THREADS = range(1025)
_FLAG = range(2)
# As in Triton.
_FLAG_WORDS = {"true": "1", "on": "1", "false": "0", "off": "0"}
_SHRINK_ARENA = "memory.enable_memory_arena_shrinkage"


@dataclass(frozen=True, slots=True)
class Execution:
    """Where to run. `providers`: in order of preference, with their options. `device`: the number of a GPU, or None.

    `missing`: providers that the configuration asks for and this machine lacks. `cuda_graphs`: record the kernels of a
    shape once and replay them. `pinned_outputs`: copy outputs from the GPU through page-locked memory.
    """

    providers: tuple[tuple[str, Mapping[str, str]], ...]
    device: int | None
    missing: tuple[str, ...]
    cuda_graphs: bool
    pinned_outputs: bool


def executions(config: ModelConfig, available: Sequence[str], caches: str = "") -> list[Execution]:
    """One execution for each device that the configuration names; at least one. Raises ConfigError.

    `available`: the execution providers of this machine. Missing providers are left out; the CPU is the last resort.
    `caches`: folder for engines that TensorRT builds; "": the current one.
    """
    groups = config.instance_group
    on_gpu = any(group.kind == config_pb2.ModelInstanceGroup.KIND_GPU or group.gpus for group in groups)
    on_cpu = any(group.kind == config_pb2.ModelInstanceGroup.KIND_CPU for group in groups)
    if on_gpu and on_cpu:
        raise ConfigError("has instances on the GPU and on the CPU; their answers differ, so a model has one kind")
    devices = sorted({device for group in groups for device in group.gpus})
    named = {"tensorrt": TENSORRT, "cuda": CUDA}
    wanted = config.optimization.execution_accelerators.gpu_execution_accelerator
    accelerators = tuple([named[each.name] for each in wanted if each.name in named])
    if on_cpu or not (on_gpu or accelerators or CUDA in available):
        return [_on_cpu(config, available)]
    if CUDA not in available:
        return [_on_cpu(config, available, missing=accelerators or (CUDA,))]
    return [_on_gpu(config, available, device, caches) for device in devices or [0]]


def _on_cpu(config: ModelConfig, available: Sequence[str], missing: tuple[str, ...] = ()) -> Execution:
    providers: list[tuple[str, Mapping[str, str]]] = []
    for accelerator in config.optimization.execution_accelerators.cpu_execution_accelerator:
        if accelerator.name != "openvino":
            raise ConfigError(f"names {accelerator.name!r} as cpu_execution_accelerator; there is openvino")
        if OPENVINO in available:
            options = _allowed("openvino", accelerator.parameters, _OPENVINO_OPTIONS)
            providers.append((OPENVINO, {"device_type": "CPU", **options}))
        else:
            missing = (*missing, OPENVINO)
    return Execution((*providers, (CPU, {})), None, missing, cuda_graphs=False, pinned_outputs=False)


def _on_gpu(config: ModelConfig, available: Sequence[str], device: int, caches: str) -> Execution:
    optimization = config.optimization
    providers: list[tuple[str, Mapping[str, str]]] = []
    missing: tuple[str, ...] = ()
    cuda = {"device_id": str(device), **_cuda_parameters(config)}
    if optimization.cuda.graphs:
        cuda["enable_cuda_graph"] = "1"
    for accelerator in optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "tensorrt":
            if TENSORRT in available:
                options = _tensorrt_options(accelerator.parameters, caches)
                providers.append((TENSORRT, {"device_id": str(device), **options}))
            else:
                missing = (TENSORRT,)
        elif accelerator.name == "cuda":
            cuda |= _allowed("cuda", accelerator.parameters, _CUDA_OPTIONS)
        else:
            raise ConfigError(f"names {accelerator.name!r} as gpu_execution_accelerator; there are tensorrt and cuda")
    # As in Triton, on unless the configuration turns it off.
    pinned = not optimization.HasField("output_pinned_memory") or optimization.output_pinned_memory.enable
    return Execution(
        (*providers, (CUDA, cuda), (CPU, {})),
        device,
        missing,
        cuda_graphs=optimization.cuda.graphs,
        pinned_outputs=pinned,
    )


def _tensorrt_options(parameters: Mapping[str, str], caches: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parameters.items():
        if name in CACHE_PATHS:
            continue
        if name == "precision_mode":
            if value not in _TENSORRT_PRECISIONS:
                known = ", ".join(_TENSORRT_PRECISIONS)
                raise ConfigError(f"sets precision_mode of tensorrt to {value!r}; there are {known}")
            options |= _TENSORRT_PRECISIONS[value]
        else:
            options[_TENSORRT_NAMES.get(name, name)] = {"true": "1", "false": "0"}.get(value.lower(), value)
    options = _allowed("tensorrt", options, _TENSORRT_OPTIONS)
    for cache in ("engine", "timing"):
        if caches and options.get(f"trt_{cache}_cache_enable") == "1":
            options[f"trt_{cache}_cache_path"] = caches
    return options


def _allowed(accelerator: str, options: Mapping[str, str], allowed: frozenset[str]) -> dict[str, str]:
    if unknown := sorted(options.keys() - allowed):
        raise ConfigError(
            f"sets {unknown[0]!r} of {accelerator}; a configuration may set {', '.join(sorted(allowed))}. Options that "
            "name files, libraries or memory are the worker's"
        )
    return dict(options)


def _cuda_parameters(config: ModelConfig) -> dict[str, str]:
    options = {}
    if (limit := _whole(config, "gpu_mem_limit", range((1 << 63) - 1))) is not None:
        options["gpu_mem_limit"] = str(limit)
    for name, values in _CUDA_PARAMETERS.items():
        if (index := _whole(config, name, range(len(values)))) is not None:
            options[name] = values[index]
    return options


def session_options(config: ModelConfig, threads: int) -> onnxruntime.SessionOptions:
    """The session options. `threads`: of the model's concurrent runs together, unless the configuration sets those of
    one run. Raises ConfigError."""
    options = onnxruntime.SessionOptions()
    shared = max(1, threads // instances(config))
    options.intra_op_num_threads = _whole(config, "intra_op_thread_count", _THREADS) or shared
    options.inter_op_num_threads = _whole(config, "inter_op_thread_count", _THREADS) or 0
    if _whole(config, "execution_mode", _FLAG):
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = _GRAPH_LEVELS[config.optimization.graph.level]
    if (arena := _whole(config, "enable_mem_arena", _FLAG)) is not None:
        options.enable_cpu_mem_arena = bool(arena)
    if (pattern := _whole(config, "enable_mem_pattern", _FLAG)) is not None:
        options.enable_mem_pattern = bool(pattern)
    if (device := _whole(config, "session.use_device_allocator_for_initializers", _FLAG)) is not None:
        options.add_session_config_entry("session.use_device_allocator_for_initializers", str(device))
    # Otherwise ONNX Runtime would read a file *.ort in its own format, which none of the checks here reads.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Failures are reported to the caller. If they were logged too, callers could flood the log.
    options.log_severity_level = 4
    # A thread that spins takes a core from the event loop and from the other workers of this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def concurrent_runs(config: ModelConfig, threads: int, provider: str) -> int:
    """How many runs of a model are made at a time: one on each instance, but on the CPU not more than `threads`.

    More would take turns on the same cores, with smaller batches and colder caches.
    """
    return instances(config) if provider in ON_GPU else min(instances(config), threads)


def run_entries(config: ModelConfig) -> dict[str, str]:
    shrinks = _SHRINK_ARENA in config.parameters
    return {_SHRINK_ARENA: config.parameters[_SHRINK_ARENA].string_value} if shrinks else {}


def _whole(config: ModelConfig, name: str, allowed: range) -> int | None:
    """The value of a parameter; None if it is not set. Raises ConfigError."""
    if name not in config.parameters:
        return None
    text = config.parameters[name].string_value
    if allowed == _FLAG:
        text = _FLAG_WORDS.get(text.lower(), text)
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if number not in allowed:
        few = " or ".join(map(str, allowed)) if len(allowed) < 5 else f"a whole number from 0 to {allowed[-1]}"
        raise ConfigError(f"sets parameter {name!r} to {text!r}; it is {few}")
    return number
