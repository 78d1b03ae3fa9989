"""Configurations of public repositories: each is served, with the answers of ONNX Runtime, or refused with the field.

docs/migrating.md has the table of what is the same as in Triton, what differs and why.
"""

import re
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.oip.v2 import model_config_pb2 as config_pb2
from tritonclient import utils

from services.inference.repository import config
from tests import public_configurations, triton_models
from tests.public_configurations import CASES, Case
from tests.system import processes

DOCUMENT = Path(__file__).parents[2] / "docs/migrating.md"
EXAMPLES = {
    name: Case("triton-inference-server/server, docs/examples/model_repository", text)
    for name, text in triton_models.CONFIGS.items()
}
EXAMPLES["simple_identity"] = Case(
    EXAMPLES["simple_identity"].origin,
    EXAMPLES["simple_identity"].config,
    why='of `backend: "python"` there; as an ONNX model it takes UTF-8 only',
)
EXAMPLES["simple_dyna_sequence"] = Case(
    EXAMPLES["simple_dyna_sequence"].origin,
    EXAMPLES["simple_dyna_sequence"].config,
    no_effect=("sequence_batching.oldest.max_candidate_sequences", "parameters.execute_delay_ms"),
)
ALL = CASES | EXAMPLES
SERVED = [name for name, case in ALL.items() if not case.refused]
REFUSED = [name for name in ALL if name not in SERVED]
# Sizes that a configuration leaves free: of the batch, and of other dimensions.
ROWS, FREE = 2, 3

_Control = config_pb2.ModelSequenceBatching.Control
_NUMBERS = ("INT8", "INT32", "INT64", "UINT8", "UINT64", "FP16", "FP32")
DTYPES = {name: np.dtype(utils.triton_to_np_dtype(name)) for name in _NUMBERS} | {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(object),
}
OF_ONNX = {"float": "FP32", "float16": "FP16", "bfloat16": "BF16", "string": "BYTES"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return triton_models.build(public_configurations.build(tmp_path_factory.mktemp("repository")))


@pytest.fixture(scope="module")
def stub(repository):
    """Of a worker that serves all of them."""
    worker = processes.start("services.inference", models=repository, engine="native", threads=1)
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(worker.address, options) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    processes.stop(worker)


def infer(stub, name, inputs, **parameters):
    """The outputs, by name."""
    request = v2.ModelInferRequest(model_name=name)
    for tensor, value in inputs.items():
        datatype = next(each for each, dtype in DTYPES.items() if dtype == value.dtype)
        request.inputs.add(name=tensor, datatype=datatype, shape=value.shape)
        raw = utils.serialize_byte_tensor(value).item() if datatype == "BYTES" else value.tobytes()
        request.raw_input_contents.append(raw)
    for key, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param"
        setattr(request.parameters[key], kind, value)
    response = stub.ModelInfer(request, timeout=60)
    return {
        output.name: decoded(raw, output.datatype).reshape([*output.shape])
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def decoded(raw, datatype):
    return utils.deserialize_bytes_tensor(raw) if datatype == "BYTES" else np.frombuffer(raw, DTYPES[datatype])


class Reference:
    """ONNX Runtime on a model of the repository, with what its configuration says about shapes and sequences."""

    def __init__(self, repository, name):
        case = ALL[name]
        self.repository, self.name = repository, name
        self.config = config.parse((repository / name / "config.pbtxt").read_text(), "config.pbtxt", name)
        self.rows = [ROWS] if self.config.max_batch_size else []
        if self.config.max_batch_size == 1 or self.config.HasField("sequence_batching"):
            self.rows = [1] * len(self.rows)
        self.listed = {tensor.name for tensor in self.config.output}
        self.declared = {tensor.name: tensor for tensor in (*self.config.input, *self.config.output)}
        self.states = {}
        sequences = self.config.sequence_batching
        self.hidden = {control.name for control in sequences.control_input} | {s.input_name for s in sequences.state}
        if not self.config.HasField("ensemble_scheduling"):
            file = repository / name / case.served[0] / case.file
            self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            self.shapes = {node.name: self._of_file(node) for node in self.session.get_inputs()}

    def _of_file(self, node):
        return [*self.rows, *(FREE if not isinstance(size, int) else size for size in node.shape[len(self.rows) :])]

    def inputs(self, seed):
        """A value for each input that a caller gives, in the shapes and datatypes of the configuration."""
        if self.config.HasField("ensemble_scheduling"):
            return {tensor.name: self._value(tensor, name_of(tensor.data_type), seed) for tensor in self.config.input}
        return {
            node.name: self._value(node, datatype_of(node), seed)
            for node in self.session.get_inputs()
            if node.name not in self.hidden
        }

    def _value(self, tensor, datatype, seed):
        declared = self.declared.get(tensor.name)
        dims = [] if declared is None else [FREE if size == -1 else size for size in declared.dims]
        shape = self._of_file(tensor) if declared is None else [*self.rows, *dims]
        random = np.random.default_rng(seed)
        if datatype == "BYTES":
            return random.integers(0, 9, shape).astype(str).astype(object)
        dtype = DTYPES[datatype]
        values = random.integers(0, 9, shape) if dtype.kind in "iu" else random.random(shape)
        return values.astype(dtype)

    def answer(self, given, start=True, end=False, sequence_id=0):
        """The outputs by name, in the shapes of the configuration."""
        if self.config.HasField("ensemble_scheduling"):
            return self._of_steps(given)
        feeds = {name: value.reshape(self._inner(name, value)) for name, value in given.items()}
        feeds |= self._controls(start, end, sequence_id) | ({} if start else self.states)
        if start:
            feeds |= self._initial()
        feeds = {name: value for name, value in feeds.items() if name in self.shapes or name in given}
        names = [node.name for node in self.session.get_outputs()]
        found = dict(zip(names, self._run(names, feeds), strict=True))
        self.states = {state.input_name: found[state.output_name] for state in self.config.sequence_batching.state}
        return {name: self._outer(name, value) for name, value in found.items()}

    def _run(self, names, feeds):
        if not any(value.dtype == ml_dtypes.bfloat16 for value in feeds.values()):
            return self.session.run(names, feeds)
        # The only such model is the identity.
        return [*feeds.values()]

    def _inner(self, name, value):
        declared = self.declared.get(name)
        if declared is not None and declared.HasField("reshape"):
            return [*self.rows, *declared.reshape.shape]
        return value.shape if self.shapes[name] else []

    def _outer(self, name, value):
        declared = self.declared.get(name)
        if declared is None or (not declared.HasField("reshape") and value.ndim):
            return value
        return value.reshape([*self.rows, *declared.dims])

    def _controls(self, start, end, sequence_id):
        values = {_Control.CONTROL_SEQUENCE_START: start, _Control.CONTROL_SEQUENCE_END: end}
        made = {}
        for tensor in self.config.sequence_batching.control_input:
            (control,) = tensor.control
            corrid = control.kind == _Control.CONTROL_SEQUENCE_CORRID
            (node,) = [node for node in self.session.get_inputs() if node.name == tensor.name]
            value = sequence_id if corrid else values.get(control.kind, True)
            made[tensor.name] = np.full(self.shapes[tensor.name], value, DTYPES[datatype_of(node)])
        return made

    def _initial(self):
        made = {}
        for state in self.config.sequence_batching.state:
            dtype, shape = DTYPES[name_of(state.data_type)], [*self.rows, *state.dims]
            made[state.input_name] = np.zeros(shape, dtype)
            if file := "".join(initial.data_file for initial in state.initial_state):
                data = (self.repository / self.name / "initial_state" / file).read_bytes()
                made[state.input_name] = np.frombuffer(data, dtype).reshape(shape)
        return made

    def _of_steps(self, given):
        tensors = dict(given)
        for step in self.config.ensemble_scheduling.step:
            model = Reference(self.repository, step.model_name)
            found = model.answer({name: tensors[tensor] for name, tensor in step.input_map.items()})
            tensors |= {tensor: found[name] for name, tensor in step.output_map.items()}
        return {tensor.name: tensors[tensor.name] for tensor in self.config.output}


def name_of(datatype):
    return config_pb2.DataType.Name(datatype).removeprefix("TYPE_").replace("STRING", "BYTES")


def datatype_of(node):
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    return OF_ONNX.get(kind, kind.upper())


def assert_equal(found, expected):
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        if value.dtype == object:
            assert [text.decode() for text in value.ravel()] == [*expected[name].ravel()]
        else:
            np.testing.assert_allclose(value.astype(np.float64), expected[name].astype(np.float64), rtol=1e-3)


@pytest.mark.parametrize("name", SERVED)
def test_each_is_served_with_the_answers_of_onnx_runtime(stub, repository, name):
    reference = Reference(repository, name)
    offered = {output.name for output in stub.ModelMetadata(v2.ModelMetadataRequest(name=name)).outputs}
    steps = [{}]
    if reference.config.HasField("sequence_batching"):
        steps = [{"start": True, "end": False}, {"start": False, "end": False}, {"start": False, "end": True}]
    for seed, step in enumerate(steps):
        given = reference.inputs(seed)
        sequence = {f"sequence_{key}": value for key, value in step.items()} | ({"sequence_id": 7} if step else {})
        found = infer(stub, name, given, **sequence)
        assert found.keys() == offered == (reference.listed or found.keys())
        assert_equal(found, reference.answer(given, sequence_id=7, **step))


@pytest.mark.parametrize("name", REFUSED)
def test_each_other_is_refused_with_a_reason_that_names_the_field(stub, name):
    (line,) = [line for line in stub.RepositoryIndex(v2.RepositoryIndexRequest()).models if line.name == name]
    assert line.state == "UNAVAILABLE"
    for words in ALL[name].refused:
        assert words in line.reason
    assert not stub.ModelReady(v2.ModelReadyRequest(name=name)).ready


@pytest.mark.parametrize("name", SERVED)
def test_fields_without_an_effect_are_reported_and_no_others(repository, name):
    reference = Reference(repository, name)
    assert sorted(config.ignored_fields(reference.config)) == sorted(ALL[name].no_effect)


@pytest.mark.parametrize("name", SERVED)
def test_the_versions_of_the_policy_are_served_and_the_configuration_is_told_whole(stub, repository, name):
    assert [*stub.ModelMetadata(v2.ModelMetadataRequest(name=name)).versions] == [*ALL[name].served]
    told = stub.ModelConfig(v2.ModelConfigRequest(name=name)).config
    assert included(Reference(repository, name).config, told)


def included(given, told):
    """Whether `told` has each field of `given`, and in a list more at most at its end."""
    return all(one_included(field, value, getattr(told, field.name)) for field, value in given.ListFields())


def one_included(field, given, told):
    if field.message_type is None:
        return given == told
    if field.message_type.GetOptions().map_entry:
        return given.items() <= told.items()
    if field.is_repeated:
        return len(given) <= len(told) and all(map(included, given, told))
    return included(given, told)


def test_the_table_of_the_guide_says_what_this_suite_shows():
    text = DOCUMENT.read_text()
    section = text[text.index("### Configurations of public repositories") :]
    rows = re.findall(r"(?m)^\| (`.*?) \| (same|different|not served) \| (.*?) ?\|$", section.partition("\n## ")[0])
    told = {name: (result, why) for names, result, why in rows for name in re.findall("`([^`]+)`", names)}
    assert told == {
        name: (case.result, case.why or ("both refuse it" if case.refused else "")) for name, case in ALL.items()
    }
