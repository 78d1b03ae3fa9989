"""What cannot be served is told by name and cause; what is beside it is served."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference import envelope, work_results
from services.inference.envelope import Work
from services.inference.models.model_store import READY, UNAVAILABLE, ModelStore
from services.inference.repository.repository import Directory
from services.runtime import driver
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from tests import models
from tests.models import save, value
from tests.unit.inference.loaded import EXECUTOR, open_model
from tests.unit.inference.models.test_memory_budget import worker

X, Y = value("x", TensorProto.FLOAT, "n", 2), value("y", TensorProto.FLOAT, "n", 2)


def identity(repository, nodes=None, initializers=(), **options):
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    return save(repository, "bad", nodes, [X], [Y], initializers, **options) / "model.onnx"


def truncated(repository):
    path = identity(repository)
    path.write_bytes(path.read_bytes()[:-20])


def empty(repository):
    identity(repository).write_bytes(b"")


def future_opset(repository):
    path = identity(repository)
    model = onnx.load(path)
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())


def unknown_operator(repository):
    graph = helper.make_graph([helper.make_node("Nonsense", ["x"], ["y"])], "bad", [X], [Y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    identity(repository).write_bytes(model.SerializeToString())


def compiled_engine(repository):
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/engine")
    graph = helper.make_graph([node], "bad", [X], [Y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    identity(repository).write_bytes(model.SerializeToString())


def in_another_format(repository):
    """ONNX Runtime would take it for its own format, by its name."""
    identity(repository).rename(repository / "bad/1/model.ort")
    (repository / "bad/1/model.ort").write_bytes(b"    ORTM")
    (repository / "bad/config.pbtxt").write_text('default_model_filename: "model.ort"')


def outside(location, *, constant=False):
    """A weight, or a constant, that is kept in another file."""

    def make(repository):
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, 2], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=location)
        nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
        if constant:
            nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
        graph = helper.make_graph(nodes, "bad", [X], [Y], [] if constant else [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        identity(repository).write_bytes(model.SerializeToString())
        secret = repository / "secret.bin"
        secret.write_bytes(np.ones(2, np.float32).tobytes())
        (repository / "bad/1/link.bin").symlink_to(secret)
        (repository / "bad/1/short.bin").write_bytes(bytes(4))

    return make


def huge_weight(repository):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "bad", [X], [Y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    identity(repository).write_bytes(model.SerializeToString())


def wrong_config(repository):
    identity(repository)
    (repository / "bad/config.pbtxt").write_text('input { name: "z" data_type: TYPE_FP32 dims: [2] }')


def unreadable_config(repository):
    identity(repository)
    (repository / "bad/config.pbtxt").write_text("max_batch_size: many")


async def served(repository):
    models.mlp(repository)
    made = ModelStore(Directory(repository), open_model, EXECUTOR)
    await made.load_all()
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "1/model.onnx"),
        (empty, "1/model.onnx"),
        (future_opset, "opset"),
        (unknown_operator, "Nonsense"),
        (outside("missing.bin"), "missing.bin"),
        (outside("../../secret.bin"), "secret.bin"),
        (outside("/etc/hostname"), "Absolute path"),
        (outside("link.bin"), "link.bin"),
        (outside("../../secret.bin", constant=True), "secret.bin"),
        (outside("/etc/hostname", constant=True), "Absolute path"),
        (outside("*/_ORT_MEM_ADDR_/*"), "1/model.onnx"),
        (outside("*/_ORT_MEM_ADDR_/*", constant=True), "1/model.onnx"),
        (compiled_engine, "EPContext"),
        (in_another_format, "no ONNX model"),
        (outside("short.bin"), "1/model.onnx"),
        (huge_weight, "8796093022208 bytes"),
        (wrong_config, "'z'"),
        (unreadable_config, "config.pbtxt"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_model_that_cannot_be_served_says_why_and_the_others_are_served(tmp_path, make, words):
    make(tmp_path)
    made = await served(tmp_path)
    lines = {line.name: line for line in await made.index()}
    assert lines["mlp"].state == READY
    assert lines["bad"].state == UNAVAILABLE
    assert words in lines["bad"].reason
    assert "\n" not in lines["bad"].reason
    with pytest.raises(InvalidArgumentError, match="failed to load 'bad'"):
        await made.load("bad")


async def test_a_file_that_declares_rows_of_terabytes_is_loaded_without_a_probe_of_them(tmp_path):
    x, y = value("x", TensorProto.FLOAT, "n", 1 << 40), value("y", TensorProto.FLOAT, "n", 1 << 40)
    for name in ("wide", "configured"):
        save(tmp_path, name, [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    (tmp_path / "configured/config.pbtxt").write_text("max_batch_size: 8")
    made = await served(tmp_path)
    assert "1099511627776 elements" in made.held.find("wide", "").model.batchable.reason
    assert made.held.find("configured", "").model.batchable


def exploding(repository):
    """INT64 x[2] -> FP32 y of that shape."""
    x, y = value("x", TensorProto.INT64, 2), value("y", TensorProto.FLOAT, "n", "m")
    return save(repository, "exploding", [helper.make_node("ConstantOfShape", ["x"], ["y"])], [x], [y])


def request(rows, columns):
    message = v2.ModelInferRequest(model_name="exploding")
    message.inputs.add(name="x", datatype="INT64", shape=[2])
    message.raw_input_contents.append(np.array([rows, columns], np.int64).tobytes())
    return message.SerializeToString()


async def ask(made, rows, columns):
    (result,) = await driver.run(worker(made).execute([Work(request(rows, columns), b"", None, b"")]))
    return result


async def test_a_request_whose_outputs_explode_fails_alone(tmp_path, monkeypatch):
    exploding(tmp_path)
    made = await served(tmp_path)
    failure = (await ask(made, 1 << 40, 4)).failure
    assert failure.code == ResourceExhaustedError.code.value[0]
    assert "17592186044416 bytes" in failure.message
    monkeypatch.setattr(work_results, "MAX_RESPONSE_BYTES", 1000)
    assert "at most 1000" in (await ask(made, 1000, 1)).failure.message
    assert not (await ask(made, 10, 1)).HasField("failure")


async def test_answers_that_are_too_many_for_one_envelope_fail_alone(tmp_path, monkeypatch):
    exploding(tmp_path)
    made = worker(await served(tmp_path))
    monkeypatch.setattr(envelope, "MAX_ENVELOPE_BYTES", 10_000)
    works = [Work(request(rows, 1), b"", None, b"") for rows in (1000, 2000, 1000)]
    failed = [result.HasField("failure") for result in await driver.run(made.execute(works))]
    assert failed == [False, True, False]
