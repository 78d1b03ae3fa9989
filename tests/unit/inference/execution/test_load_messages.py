"""What is wrong with a model, in words that say what to change; one test for each."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from services.inference.execution import run_errors
from services.inference.execution.model import ModelLoadError
from services.runtime.errors import InternalError
from tests import models
from tests.models import save, value
from tests.unit.inference.execution.test_model import configured
from tests.unit.inference.loaded import load

X, Y = value("x", TensorProto.FLOAT, "n", 2), value("y", TensorProto.FLOAT, "n", 2)
UNRANKED_X, UNRANKED_Y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")


def zip_map(repository):
    """As skl2onnx exports classifiers."""
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    pairs = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, ()))
    output = helper.make_value_info("y", helper.make_sequence_type_proto(pairs))
    graph = helper.make_graph([node], "m", [X], [output])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return written(repository, helper.make_model(graph, opset_imports=domains, ir_version=9))


def float8(repository):
    output = value("y", TensorProto.FLOAT8E4M3FN, "n", 2)
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)], "m", [X], [output])
    return written(repository, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))


def written(repository, model):
    folder = repository / "m/1"
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (zip_map, "'y' is a seq(map(int64,tensor(float))), for which the v2 protocol has no datatype; convert the"),
        (float8, "'y' is a tensor(float8e4m3fn), for which the v2 protocol has no datatype"),
    ],
)
def test_a_type_that_the_protocol_lacks_is_no_fault_of_a_configuration(tmp_path, make, words):
    with pytest.raises(ModelLoadError) as caught:
        load(make(tmp_path))
    assert words in str(caught.value)
    assert "config.pbtxt" not in str(caught.value)


def test_dims_that_hold_the_batch_are_told_that_max_batch_size_adds_it(tmp_path):
    shape = ("n", 1, 28, 28)
    x, y = value("x", TensorProto.FLOAT, *shape), value("y", TensorProto.FLOAT, *shape)
    folder = save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    with pytest.raises(ModelLoadError) as caught:
        configured(folder, 'max_batch_size: 8 input { name: "x" dims: [-1, 1, 28, 28] }')
    assert (
        "gives 'x' dims [-1, 1, 28, 28]; the file has [-1, 1, 28, 28]: max_batch_size adds a dimension for the batch, "
        "so they should be [1, 28, 28]" in str(caught.value)
    )


def test_dims_without_the_batch_are_told_that_no_max_batch_size_adds_it(tmp_path):
    with pytest.raises(ModelLoadError, match="no max_batch_size that would add a dimension for the batch, so they"):
        configured(models.mlp(tmp_path), 'max_batch_size: 0 input { name: "x" dims: [64] }')


def test_dims_with_a_wrong_size_are_told_the_sizes_alone(tmp_path):
    with pytest.raises(ModelLoadError, match=r"gives 'x' dims \[-1, 65\]; the file has \[-1, 64\]$"):
        configured(models.mlp(tmp_path), 'max_batch_size: 0 input { name: "x" dims: [-1, 65] }')


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a b/model.onnx failed:Fatal error: "
            "com.acme:MyOp(-1) is not a registered function/op",
            "com.acme:MyOp(-1) is not a registered function/op; libraries of custom operators are not loaded",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /onnxruntime_src/onnxruntime/core/"
            "providers/cpu/text/string_normalizer.cc:235 onnxruntime::StringNormalizer::Locale::Locale(const "
            "std::string&)::<lambda()> Failed to construct locale with name:en_US.UTF-8:locale::facet::"
            "_S_create_c_locale name not valid:Please, install necessary language-pack-XX and configure locales",
            "Failed to construct locale with name:en_US.UTF-8:locale::facet::_S_create_c_locale name not valid:Please, "
            "install necessary language-pack-XX and configure locales; the model's StringNormalizer needs the locale "
            "en_US.UTF-8; install it on this host (Debian: locales-all)",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from x/model.onnx failed:/onnxruntime_src/onnxruntime/core/"
            "graph/model_load_utils.h:46 void onnxruntime::model_load_utils::ValidateOpsetForDomain(const "
            "std::unordered_map<std::__cxx11::basic_string<char>, int>&, bool, const std::string&, int) Opset 99 is "
            "under development",
            "Opset 99 is under development",
        ),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions", "Got invalid dimensions"),
    ],
)
def test_onnx_runtimes_message_is_without_its_source_and_with_a_remedy(message, words):
    assert run_errors.load_failure(RuntimeError(message)) == words


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    folder = models.mlp(tmp_path)
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelLoadError, match="it is a pointer of Git LFS, not the model; `git lfs pull` fetches"):
        load(folder)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"Z": "dims: [2] zero_data: true"}, "it gives input 'Z'; the model has 'a', 'b'"),
        ({"a": "dims: [2] zero_data: true"}, "it gives no input 'b', which the model needs"),
        (dict.fromkeys("ab", "data_type: TYPE_INT8 dims: [2]"), "it gives 'a' as TYPE_INT8; the file says FP32"),
        (dict.fromkeys("ab", "dims: [3] zero_data: true"), "Got invalid dimensions for input"),
    ],
)
def test_a_warm_up_that_fails_says_why(tmp_path, caplog, inputs, words):
    sample = " ".join(f'inputs {{ key: "{name}" value {{ {given} }} }}' for name, given in inputs.items())
    model = configured(models.add_sub(tmp_path), f'model_warmup {{ name: "w" {sample} }}')
    with pytest.raises(ModelLoadError) as caught:
        model.warm_up()
    assert f"model_warmup 'w' failed: {words}" in str(caught.value)
    assert not caplog.records


def test_an_input_of_unknown_rank_needs_dims_and_is_no_scalar(tmp_path):
    folder = save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [UNRANKED_X], [UNRANKED_Y])
    with pytest.raises(ModelLoadError, match="does not say how many dimensions input 'x' has; config"):
        load(folder)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for text, shape in (("", (-1, 2)), ("max_batch_size: 8", (-1, -1, 2)), ("max_batch_size: 0", (-1, 2))):
        model = configured(folder, f'{text} input {{ name: "x" data_type: TYPE_FP32 dims: [-1, 2] }}')
        assert (model.inputs["x"].shape, model.outputs["y"].shape) == (shape, (-1,))
        (answer,) = model.run({"x": x.reshape(3, *[1] * (len(shape) - 2), 2)}, ["y"])
        assert answer.tobytes() == x.tobytes()


def test_an_output_of_unknown_rank_has_the_dims_of_the_configuration(tmp_path):
    folder = save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [UNRANKED_X], [UNRANKED_Y])
    model = configured(folder, 'max_batch_size: 8 input { name: "x" dims: [2] } output { name: "y" dims: [2] }')
    assert (model.inputs["x"].shape, model.outputs["y"].shape) == ((-1, 2), (-1, 2))


def test_a_probe_that_fails_is_not_logged_if_the_model_loads(tmp_path, caplog):
    x = value("x", TensorProto.STRING, "n", 2)
    # Some of the probe's strings are no numbers.
    model = load(save(tmp_path, "m", [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], [x], [Y]))
    assert "a probe of two rows failed" in model.batchable.reason
    assert not caplog.records


def test_an_answer_that_is_no_text_fails_with_that_reason(tmp_path):
    x, y = value("x", TensorProto.STRING, "n"), value("y", TensorProto.STRING, "m")
    other = TensorProto(name="c", data_type=TensorProto.STRING, dims=[1], string_data=[b"\xff"])
    model = load(save(tmp_path, "m", [helper.make_node("Concat", ["x", "c"], ["y"], axis=0)], [x], [y], [other]))
    with pytest.raises(InternalError, match="answers with a string that is not UTF-8, as all strings of ONNX are"):
        model.run({"x": np.array([b"a"], object)}, ["y"])
