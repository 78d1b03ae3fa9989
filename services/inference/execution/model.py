"""One version of a model in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.codec.tensor_spec import CONFIG_TYPES, TensorSpec, UnservableError, input_specs, output_specs
from services.inference.execution import execution, graph, inline_runs
from services.inference.execution.batch_proof.prover import prove
from services.inference.execution.run_errors import load_failure, run_error
from services.inference.execution.sessions import InferenceSessions
from services.inference.repository.config import (
    SHARED_TIER,
    ConfigError,
    ModelConfig,
    add_defaults,
    batching,
    limits_queue,
    serving_rules,
)
from services.inference.repository.repository import MODEL_FILE, ModelFiles, data_file
from services.runtime.errors import InvalidArgumentError, RingmeshError
from services.runtime.oip.tensors import decode
from services.runtime.verdict import YES, Verdict

Arrays = Mapping[str, npt.NDArray[Any]]

NOT_PROVEN = "rows are not proven independent"
# Machine code for an execution provider, in the node or in a file that the node names.
_COMPILED = "com.microsoft.EPContext"


class ModelLoadError(Exception):
    """The model cannot be served; the message names the file and the cause."""


class OnnxModel:
    """A loaded model. `run` may be called from several threads. `loading.load_model` makes one.

    `required`: the inputs that every request has. `hidden_inputs`, `hidden_outputs`: controls and states of sequences.
    `independence`: whether the graph proves that rows do not depend on each other.
    `has_rows`: the first dimension is the batch. A request has at most `max_request_rows` rows; 0: any number.
    `batchable`: requests may share a run along the batch, with at most `max_batch_rows`. `cacheable`: equal requests
    have equal answers. `inline`: runs may be made on the thread that received the requests. `row_cache`: rows of a
    batch may be cached one by one. `provider`: the execution provider in use. `concurrent_runs`: how many may be made
    at a time. `rules`: how routers treat its requests.
    """

    # Only an ensemble may lack steps.
    runnable = YES
    platform = "onnxruntime_onnx"
    # Until the rows have been probed.
    batchable = row_cache = Verdict("its rows have not been probed")
    has_rows = False
    max_batch_rows = 1

    def __init__(self, files: ModelFiles, *, providers: Sequence[str], intra_op_threads: int, caches: str = "") -> None:
        """`files` must not change while the model lives, because its weights may be mapped. `providers`: those of this
        machine. `intra_op_threads`: unless the configuration sets them. `caches`: folder for TensorRT's
        engines. Raises ModelLoadError."""
        self.name, self.version, self.labels = files.name, files.version, files.labels
        self.configured = configured = files.config
        self.folder = files.folder
        self.max_request_rows = configured.max_batch_size
        try:
            proto = graph.read(files.model)
            random = graph.random_operators(proto)
            operators = graph.operator_types(proto)
            if _COMPILED in operators:
                raise UnservableError(f"it has {_COMPILED}, a compiled engine; only operators are served")
            self._aborts_on_empty = graph.aborting_operators(proto)
            unranked = graph.unranked(proto)
            self.independence = prove(proto)
            self.inline = inline_runs.verdict(proto)
            del proto  # frees memory before the session is made
            self._sessions = sessions = InferenceSessions(
                files, providers, intra_op_threads, self._output_shape, caches
            )
            self.inputs = input_specs(sessions.inputs, sessions.initializers, configured, unranked)
            self.outputs = output_specs(sessions.outputs, configured, unranked)
            self.hidden_inputs, self.hidden_outputs = self._hide_tensors()
        except ConfigError as error:
            raise ModelLoadError(f"cannot load {files.model}: its config.pbtxt {error}") from None
        except Exception as error:  # ONNX Runtime raises many kinds, some of them plain RuntimeError
            raise ModelLoadError(f"cannot load {files.model}: {load_failure(error)}") from None
        self.provider = sessions.provider
        self.concurrent_runs = execution.concurrent_runs(configured, intra_op_threads, self.provider)
        self.digest = self.own_digest = files.digest(self.provider)
        every = (*self.inputs.values(), *self.hidden_inputs.values(), *self.outputs.values())
        if any(spec.datatype.name == "BYTES" for spec in every):
            self.inline = Verdict("it has strings, which are read one by one")
        self.required = tuple([name for name, spec in self.inputs.items() if not spec.optional])
        self._reshapes = any(spec.inner is not None for spec in every)
        self.cacheable = Verdict(f"its graph holds {', '.join(random)}" if random else "")
        if configured.HasField("sequence_batching"):
            self.cacheable = Verdict("it serves sequences, whose answers depend on what came before")
        elif configured.HasField("response_cache"):
            self.cacheable = YES if configured.response_cache.enable else Verdict("its config.pbtxt says so")
        self.limits_queue = limits_queue(batching(configured))
        self.rules = serving_rules(configured, semantic=bool(self.cacheable))

    @property
    def batch_remark(self) -> str:
        if not self.batchable:
            return f"not batched: {self.batchable.reason}"
        if self.independence:
            return "batched: rows are proven independent"
        return f"batched because its config.pbtxt says so: {NOT_PROVEN}: {self.independence.reason}"

    def _hide_tensors(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Removes controls and states from `inputs` and `outputs`, and returns them. If the configuration lists
        outputs, removes those that it leaves out. Raises ConfigError."""
        batching = self.configured.sequence_batching
        wanted = [tensor.name for tensor in batching.control_input] + [state.input_name for state in batching.state]
        if missing := [name for name in wanted if name not in self.inputs]:
            raise ConfigError(f"names {missing[0]!r} in sequence_batching; the file has no such input")
        states = [state.output_name for state in batching.state]
        if missing := [name for name in states if name not in self.outputs]:
            raise ConfigError(f"names {missing[0]!r} in sequence_batching; the file has no such output")
        listed = {tensor.name for tensor in self.configured.output}
        hidden_inputs = {name: self.inputs.pop(name) for name in wanted}
        hidden_outputs = {name: self.outputs.pop(name) for name in states if name not in listed}
        if listed:
            self.outputs = {name: spec for name, spec in self.outputs.items() if name in listed}
        return hidden_inputs, hidden_outputs

    def release(self) -> None:
        """Frees its sessions. The model keeps its description, and can run again after `restore`."""
        del self._sessions

    def restore(self, fresh: OnnxModel) -> None:
        self._sessions = fresh._sessions

    def shrink(self) -> None:
        sessions: InferenceSessions | None = getattr(self, "_sessions", None)
        if sessions is not None:
            sessions.shrink()

    def warm_up(self) -> None:
        known = self.inputs | self.hidden_inputs
        for sample in self.configured.model_warmup:
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
                    f"cannot load {self.folder}: model_warmup {sample.name!r} failed: {load_failure(error)}"
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
            raw = data_file(self.folder.parent / "warmup", wanted.input_data_file)
            return decode(spec.datatype, shape, raw, spec.name)
        if dtype.hasobject:
            return np.full(shape, b"", object)
        random = np.random.default_rng(0).random(shape) * (kind == "random_data")
        return random.astype(dtype)

    def config(self) -> ModelConfig:
        """Its config.pbtxt, completed from the file as Triton does, and with the decisions made at load."""
        made = ModelConfig()
        made.CopyFrom(self.configured)
        made.name, made.platform, made.backend = self.name, self.platform, "onnxruntime"
        made.default_model_filename = made.default_model_filename or MODEL_FILE
        made.max_batch_size = self.max_request_rows or (self.max_batch_rows if self.batchable else 0)
        # Triton's tools ask for the counts of hits only where the cache is on.
        made.response_cache.enable = bool(self.cacheable)
        if self.batchable and made.WhichOneof("scheduling_choice") is None:
            made.dynamic_batching.SetInParent()
        if not made.instance_group:
            made.instance_group.add(name=self.name)
        kinds = config_pb2.ModelInstanceGroup
        for index, group in enumerate(made.instance_group):
            group.name = group.name or f"{self.name}_{index}"
            group.count = group.count or 1
            if group.kind == kinds.KIND_AUTO:
                group.kind = kinds.KIND_GPU if self.provider in execution.ON_GPU else kinds.KIND_CPU
        add_defaults(made)
        for specs, tensors in ((self.inputs, made.input), (self.outputs, made.output)):
            declared = {tensor.name: tensor for tensor in tensors}
            for name, spec in specs.items():
                self._declare(spec, declared[name] if name in declared else tensors.add(name=name))
        for name, verdict in (
            ("batched", self.batchable),
            ("cached", self.cacheable),
            ("row_cache", self.row_cache),
            ("rows_proven_independent", self.independence),
            ("inline", self.inline),
        ):
            made.parameters[f"ringmesh_{name}"].string_value = str(verdict)
        made.parameters["ringmesh_provider"].string_value = self.provider
        made.parameters[SHARED_TIER].string_value = self.rules.shared_tier or "auto"
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
        shape = spec.shape if spec.inner is None else spec.inner
        if -1 not in shape:
            return shape
        if -1 in shape[1:] or not self.has_rows:
            return None
        return (feeds[self.required[0]].shape[0], *shape[1:])


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
