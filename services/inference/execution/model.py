"""One version of a model in ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.codec.tensor_spec import CONFIG_TYPES, TensorSpec, UnservableError, input_specs, output_specs
from services.inference.execution import graph, inline_runs, row_independence
from services.inference.execution.batch_proof.prover import prove
from services.inference.execution.run_errors import run_error
from services.inference.execution.sessions import Sessions, first_line
from services.inference.repository import batching_policy
from services.inference.repository.config import (
    CACHE_STALE,
    CACHE_TTL,
    HEDGE,
    ROW_CACHE,
    SEMANTIC_EMBEDDING,
    TENANT_SCOPE,
    ConfigError,
    ModelConfig,
    batching,
    limits_queue,
    milliseconds,
    says,
    semantic_threshold,
)
from services.inference.repository.repository import ModelFiles, data_file
from services.runtime.errors import InvalidArgumentError, RingmeshError
from services.runtime.oip.tensors import decode

log = logging.getLogger(__name__)

Arrays = Mapping[str, npt.NDArray[Any]]


# ONNX Runtime 1.32 ends the process when one of these has no rows.
_ABORT_ON_EMPTY = frozenset({"GRU", "LSTM", "Scan", "com.microsoft.DynamicQuantizeLSTM"})
# Machine code for an execution provider, in the node or in a file that the node names.
_COMPILED = "com.microsoft.EPContext"


class ModelLoadError(Exception):
    """The model cannot be served; the message names the file and the cause."""


class OnnxModel:
    """A loaded model. `run` may be called from several threads.

    `required`: the inputs that every request has. `hidden_inputs`, `hidden_outputs`: controls and states of sequences.
    `independence`: whether the graph proves that rows do not depend on each other.
    `has_rows`: the first dimension is the batch. A request has at most `max_request_rows` rows; 0: any number.
    `batchable`: requests may share a run along the batch; `batch_reason`: why not. `cacheable`: equal requests have
    equal answers; `cacheable_reason`: why not. `tenant_scoped`: tenants do not share answers. `inline_reason`: why runs
    are not made on the thread that received the requests; "" if they may be. `row_cache`: rows of a batch may be cached
    one by one; `row_cache_reason`: why not.
    `provider`: the execution provider in use.
    """

    # Only an ensemble may be not runnable, if it lacks steps.
    not_runnable = ""

    def __init__(
        self,
        files: ModelFiles,
        *,
        providers: Sequence[str],
        intra_op_threads: int,
        max_batch_rows: int,
        caches: str = "",
    ) -> None:
        """`files` must not change while the model lives, because its weights may be mapped. `providers`: those of this
        machine. `intra_op_threads` and `max_batch_rows` are defaults for the model's configuration. `caches`: folder
        for TensorRT's engines. Raises ModelLoadError."""
        self._config = files.config
        # Preliminary values, until the probe of the rows.
        self.batchable = self.has_rows = False
        try:
            proto = graph.read(files.model)
            random = graph.random_operators(proto)
            operators = graph.operator_types(proto)
            if _COMPILED in operators:
                raise UnservableError(f"it has {_COMPILED}, a compiled engine; only operators are served")
            self._aborts_on_empty = sorted(operators & _ABORT_ON_EMPTY)
            unranked = graph.unranked(proto)
            self.independence = prove(proto)
            self.inline_reason = inline_runs.why_not(proto)
            del proto  # frees memory before the session is made
            self._sessions = Sessions(
                f"{files.name}/{files.version}",
                files.model,
                self._config,
                providers,
                intra_op_threads,
                self._output_shape,
                caches,
            )
            self.provider = self._sessions.provider
            self.digest = self.own_digest = files.digest(self.provider)
        except ConfigError as error:
            raise ModelLoadError(f"cannot load {files.model}: its config.pbtxt {error}") from None
        except Exception as error:  # ONNX Runtime raises many kinds, some of them plain RuntimeError
            raise ModelLoadError(f"cannot load {files.model}: {first_line(error)}") from None
        self.name = files.name
        self.version = files.version
        self.labels = files.labels
        self._folder = files.folder
        sessions = self._sessions
        try:
            self.inputs = input_specs(sessions.inputs, sessions.initializers, files.config, unranked)
            self.outputs = output_specs(sessions.outputs, files.config, unranked)
            self.hidden_inputs, self.hidden_outputs = self._hide_sequence_tensors()
        except UnservableError as error:
            raise ModelLoadError(f"cannot load {files.model}: {error}") from None
        except ConfigError as error:
            raise ModelLoadError(f"cannot load {files.model}: its config.pbtxt {error}") from None
        every = (*self.inputs.values(), *self.hidden_inputs.values(), *self.outputs.values())
        if any(spec.datatype.name == "BYTES" for spec in every):
            self.inline_reason = "it has strings, which are read one by one"
        self.required = tuple([name for name, spec in self.inputs.items() if not spec.optional])
        self._reshapes = any(spec.inner is not None for spec in every)
        self.cacheable_reason = f"its graph holds {', '.join(random)}" if random else ""
        if self._config.HasField("sequence_batching"):
            self.cacheable_reason = "it serves sequences, whose answers depend on what came before"
        elif self._config.HasField("response_cache"):
            self.cacheable_reason = "" if self._config.response_cache.enable else "its config.pbtxt says so"
        self.cacheable = not self.cacheable_reason
        self.tenant_scoped = says(self._config, TENANT_SCOPE) is True
        self.hedged = says(self._config, HEDGE) is True
        self.limits_queue = limits_queue(batching(self._config))
        self.ttl_ms = milliseconds(self._config, CACHE_TTL)
        self.stale_ms = milliseconds(self._config, CACHE_STALE)
        self.max_request_rows = self._config.max_batch_size
        self.batch_reason = self._why_not_batched()
        self.batchable = not self.batch_reason
        self.has_rows = self.batchable or self.max_request_rows > 0
        self.max_batch_rows = (self.max_request_rows or max_batch_rows) if self.batchable else 1
        self.row_cache_reason = self._why_no_row_cache()
        self.row_cache = not self.row_cache_reason
        self.semantic_threshold = semantic_threshold(self._config) if self.cacheable else 0.0
        self.semantic_embedding = (
            self._config.parameters[SEMANTIC_EMBEDDING].string_value
            if SEMANTIC_EMBEDDING in self._config.parameters
            else ""
        )

    def _why_not_batched(self) -> str:
        """Why requests do not share runs; "" if they do. Raises ModelLoadError if the configuration sets a batch size
        but the file has a fixed first dimension."""
        policy = batching_policy.policy(self._config)
        if policy.merges is None:
            return row_independence.why_not(self, self.independence)
        if not (policy.merges or self.max_request_rows):
            return policy.reason
        fixed = row_independence.fixed_first_dimension(self)
        if fixed and self.max_request_rows:
            raise ModelLoadError(f"cannot load {self._folder}: max_batch_size is {self.max_request_rows}, but {fixed}")
        return policy.reason or fixed

    def _why_no_row_cache(self) -> str:
        """Why rows are not cached one by one; "" if they are. Raises ModelLoadError if the configuration asks for it
        but the configuration or the graph rules it out."""
        told = says(self._config, ROW_CACHE)
        if told is False:
            return "its config.pbtxt says so"
        # The rows of one request share a run even if requests do not.
        reason = self.cacheable_reason or ("" if told and self.has_rows else self.batch_reason)
        reason = reason or row_independence.not_proven(self.independence)
        if not reason and len(self.inputs) > len(self.required):
            reason = "it has optional inputs, which are for a whole run"
        if told and reason:
            raise ModelLoadError(f"cannot load {self._folder}: {ROW_CACHE} is true in its config.pbtxt, but {reason}")
        reason = reason or row_independence.why_not_cached(self, asked_for=told is True)
        if told and reason:
            log.warning("model %s: %s is true in its config.pbtxt, but %s", self.name, ROW_CACHE, reason)
        return reason

    @property
    def batch_remark(self) -> str:
        if self.batch_reason:
            return f"not batched: {self.batch_reason}"
        unproven = row_independence.not_proven(self.independence)
        return (
            f"batched because its config.pbtxt says so: {unproven}"
            if unproven
            else "batched: rows are proven independent"
        )

    @property
    def sequence_batching(self) -> config_pb2.ModelSequenceBatching:
        return self._config.sequence_batching

    def _hide_sequence_tensors(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Removes controls and states from `inputs` and `outputs`, and returns them. Raises ConfigError."""
        batching = self._config.sequence_batching
        wanted = [tensor.name for tensor in batching.control_input] + [state.input_name for state in batching.state]
        if missing := [name for name in wanted if name not in self.inputs]:
            raise ConfigError(f"names {missing[0]!r} in sequence_batching; the file has no such input")
        states = [state.output_name for state in batching.state]
        if missing := [name for name in states if name not in self.outputs]:
            raise ConfigError(f"names {missing[0]!r} in sequence_batching; the file has no such output")
        shown = {tensor.name for tensor in self._config.output}
        return (
            {name: self.inputs.pop(name) for name in wanted},
            {name: self.outputs.pop(name) for name in states if name not in shown},
        )

    def release(self) -> None:
        """Frees its sessions. The model keeps its description, and can run again after `restore`."""
        del self._sessions

    def restore(self, fresh: OnnxModel) -> None:
        self._sessions = fresh._sessions

    def shrink(self) -> None:
        sessions: Sessions | None = getattr(self, "_sessions", None)
        if sessions is not None:
            sessions.shrink()

    def warm_up(self) -> None:
        known = self.inputs | self.hidden_inputs
        for sample in self._config.model_warmup:
            try:
                if unknown := sorted(name for name in sample.inputs if name not in known):
                    raise ConfigError(f"it gives input {unknown[0]!r}; the model has {', '.join(map(repr, known))}")
                if missing := [n for n in (*self.required, *self.hidden_inputs) if n not in sample.inputs]:
                    raise ConfigError(f"it gives no input {missing[0]!r}, which the model needs")
                inputs = {name: self._warm_up_input(known[name], sample) for name in sorted(sample.inputs)}
                for _ in range(sample.count or 1):
                    self.compute(inputs, list(self.outputs))
            except Exception as error:
                raise ModelLoadError(
                    f"cannot load {self._folder}: model_warmup {sample.name!r} failed: {first_line(error)}"
                ) from None

    def _warm_up_input(self, spec: TensorSpec, sample: config_pb2.ModelWarmup) -> npt.NDArray[Any]:
        wanted = sample.inputs[spec.name]
        if wanted.data_type not in (config_pb2.TYPE_INVALID, CONFIG_TYPES[spec.datatype.name]):
            given = config_pb2.DataType.Name(wanted.data_type)
            raise ConfigError(f"it gives {spec.name!r} as {given}; the file says {spec.datatype.name}")
        dtype = spec.datatype.dtype
        batched = self.has_rows and len(wanted.dims) < len(spec.shape) and not spec.optional
        shape = (*((sample.batch_size or 1,) if batched else ()), *wanted.dims)
        kind = wanted.WhichOneof("input_data_type")
        if kind == "input_data_file":
            raw = data_file(self._folder.parent / "warmup", wanted.input_data_file)
            return decode(spec.datatype, shape, raw, spec.name)
        if dtype.hasobject:
            return np.full(shape, b"", object)
        random = np.random.default_rng(0).random(shape) * (kind == "random_data")
        return random.astype(dtype)

    def metadata(self) -> v2.ModelMetadataResponse:
        return metadata(self.name, "onnxruntime_onnx", self.inputs, self.outputs)

    def config(self) -> ModelConfig:
        """Its config.pbtxt, completed from the file and with the decisions made at load."""
        made = ModelConfig()
        made.CopyFrom(self._config)
        made.name, made.platform, made.backend = self.name, "onnxruntime_onnx", "onnxruntime"
        made.max_batch_size = self.max_request_rows or (self.max_batch_rows if self.batchable else 0)
        made.response_cache.enable = self.cacheable
        if self.batchable and made.WhichOneof("scheduling_choice") is None:
            made.dynamic_batching.SetInParent()
        if not made.instance_group:
            kind = (
                config_pb2.ModelInstanceGroup.KIND_GPU
                if "CUDA" in self.provider
                else config_pb2.ModelInstanceGroup.KIND_CPU
            )
            made.instance_group.add(name=f"{self.name}_0", kind=kind, count=1)
        for specs, tensors in ((self.inputs, made.input), (self.outputs, made.output)):
            declared = {tensor.name: tensor for tensor in tensors}
            for name, spec in specs.items():
                self._declare(spec, declared[name] if name in declared else tensors.add(name=name))
        for name, reason in (
            ("batched", self.batch_reason),
            ("cached", self.cacheable_reason),
            ("row_cache", self.row_cache_reason),
            ("rows_proven_independent", self.independence.reason),
            ("inline", self.inline_reason),
        ):
            made.parameters[f"ringmesh_{name}"].string_value = f"no: {reason}" if reason else "yes"
        made.parameters["ringmesh_provider"].string_value = self.provider
        return made

    def _declare(self, spec: TensorSpec, tensor: config_pb2.ModelInput | config_pb2.ModelOutput) -> None:
        """Completes the declaration of an input or output. Its dims omit the batch."""
        tensor.data_type = CONFIG_TYPES[spec.datatype.name]
        batched = self.has_rows and not spec.optional
        if not tensor.dims and not tensor.HasField("reshape"):
            tensor.dims[:] = spec.shape
        if batched and len(tensor.dims) == len(spec.shape):
            del tensor.dims[0]
            if tensor.HasField("reshape"):
                del tensor.reshape.shape[0]

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Runs the model without the GIL. Raises InvalidArgumentError if ONNX Runtime refuses the inputs, and the
        errors of `run_error` for other failures."""
        try:
            return self.compute(inputs, outputs)
        except RingmeshError:
            raise
        except Exception as error:
            raise run_error(self.name, error) from None

    def compute(self, inputs: Arrays, outputs: Sequence[str]) -> list[npt.NDArray[Any]]:
        """As `run`, for runs without a caller. Raises the errors of ONNX Runtime unchanged, and does not log them."""
        if self._aborts_on_empty and (empty := [name for name, array in inputs.items() if not array.size]):
            raise InvalidArgumentError(
                f"input {empty[0]!r} has no elements; model {self.name!r} needs at least one, since ONNX Runtime "
                f"cannot run its {self._aborts_on_empty[0]} on none",
                field="inputs",
            )
        feeds: dict[str, Any] = {
            name: _to_str(name, array) if array.dtype == object else array for name, array in inputs.items()
        }
        if self._reshapes:
            feeds |= {name: self.inputs[name].to_inner(feeds[name]) for name in self.inputs if name in feeds}
        arrays = self._sessions.run(outputs, feeds)
        if not self._reshapes:
            return arrays
        return [
            self.outputs[name].to_outer(array) if name in self.outputs else array
            for name, array in zip(outputs, arrays, strict=True)
        ]

    def _output_shape(self, name: str, feeds: Arrays) -> tuple[int, ...] | None:
        """The shape that an output of the file will have; None if it is only known after the run."""
        spec = self.outputs.get(name) or self.hidden_outputs[name]
        first, *rest = (spec.inner or spec.shape) or (1,)
        if -1 in rest or (first == -1 and not self.has_rows):
            return None
        return (feeds[self.required[0]].shape[0], *rest) if first == -1 else spec.inner or spec.shape


def metadata(
    name: str, platform: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> v2.ModelMetadataResponse:
    tensor = v2.ModelMetadataResponse.TensorMetadata
    told = v2.ModelMetadataResponse(name=name, platform=platform)
    for specs, field in ((inputs, told.inputs), (outputs, told.outputs)):
        field.extend(tensor(name=spec.name, datatype=spec.datatype.name, shape=spec.shape) for spec in specs.values())
    return told


def _to_str(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Decodes bytes to text, as ONNX Runtime expects; it would take the repr of bytes."""
    try:
        # Outputs of another step of an ensemble, and states of a sequence, are already text.
        text = [value if isinstance(value, str) else value.decode() for value in array.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"input {name!r}: ONNX strings are UTF-8, and an element is not: {error.reason} at byte {error.start}"
        ) from None
    made = np.empty(len(text), object)
    made[:] = text
    return made.reshape(array.shape)
