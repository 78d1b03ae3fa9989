import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from services.inference.execution.model import ModelLoadError
from services.inference.execution.row_independence import probed
from services.inference.execution.run_errors import run_error
from services.inference.repository.config import parse
from services.runtime.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from tests import models
from tests.unit.inference.loaded import load


def test_a_model_tells_its_inputs_outputs_and_provider(tmp_path):
    model = load(models.mlp(tmp_path))
    assert (model.name, model.version, model.provider) == ("mlp", 1, "CPUExecutionProvider")
    assert [(spec.datatype.name, spec.shape) for spec in model.inputs.values()] == [("FP32", (-1, 64))]
    assert (bool(model.batchable), model.max_batch_rows, bool(model.cacheable)) == (True, 8, True)


@pytest.mark.parametrize("name", models.IDENTITIES)
def test_every_datatype_goes_in_and_comes_out(tmp_path, name):
    model = load(models.identity(tmp_path, name))
    dtype = model.inputs["x"].datatype.dtype
    array = np.array([[b"a", "\u00fc".encode()]], object) if dtype.hasobject else np.array([[0, 1]]).astype(dtype)
    (answer,) = model.run({"x": array}, ["y"])
    if dtype.hasobject:
        assert answer.tolist() == [["a", "\u00fc"]]
    else:
        assert answer.dtype == dtype
        assert answer.tobytes() == array.tobytes()


def test_bfloat16_keeps_its_bits_also_from_a_slice(tmp_path):
    model = load(models.identity(tmp_path, "bf16"))
    array = np.array([[1.5, -2.25, 3.0, float("inf")]] * 3, ml_dtypes.bfloat16)[1:, ::2]
    (answer,) = model.run({"x": array}, ["y"])
    assert answer.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", models.IDENTITIES)
def test_a_scalar_comes_out_as_one(tmp_path, name):
    kind = models.IDENTITIES[name]
    x, y = models.value("x", kind), models.value("y", kind)
    model = load(models.save(tmp_path, name, [helper.make_node("Identity", ["x"], ["y"])], [x], [y]))
    array = np.array(b"1" if name == "bytes" else 1).astype(model.inputs["x"].datatype.dtype)
    (answer,) = model.run({"x": array}, ["y"])
    assert np.shape(answer) == ()


def test_bfloat16_beside_strings_is_not_served_and_the_reason_is_told(tmp_path):
    kinds = {"x": TensorProto.BFLOAT16, "s": TensorProto.STRING}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds]
    inputs, outputs = ([models.value(name + end, kind, "n") for name, kind in kinds.items()] for end in ("", "_out"))
    with pytest.raises(ModelLoadError, match="takes 's' as strings beside bfloat16"):
        load(models.save(tmp_path, "m", nodes, inputs, outputs))


def test_strings_that_are_not_utf8_are_refused(tmp_path):
    model = load(models.identity(tmp_path, "bytes"))
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        model.run({"x": np.array([[b"\xff\xfe"]], object)}, ["y"])


@pytest.mark.parametrize("make", [models.random, models.hidden_random])
def test_a_model_that_draws_random_numbers_is_not_cacheable_wherever_it_does(tmp_path, make):
    model = load(make(tmp_path))
    assert not model.cacheable
    assert "Random" in model.cacheable.reason


def across_rows(repository, kind, columns, nodes, *constants):
    """x[n,columns] -> y, by nodes of which the first may look at all rows at once."""
    x, y = (models.value(name, kind, "n", columns) for name in ("x", "y"))
    return models.save(repository, "across_rows", nodes, [x], [y], constants)


def times_the_largest(repository, kind, columns):
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["x", "largest"], ["y"]),
    ]
    return across_rows(repository, kind, columns, nodes)


def sum_of_later_rows(repository, kind, columns):
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"], reverse=1)]
    return across_rows(repository, kind, columns, nodes, numpy_helper.from_array(np.array(0), "axis"))


def sorted_rows(repository, kind, columns):
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], end=1),
        helper.make_node("TopK", ["x", "rows"], ["y", "order"], axis=0),
    ]
    return across_rows(repository, kind, columns, nodes)


def tiny_share_of_the_largest(repository, kind, columns):
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], axes=[0], keepdims=1),
        helper.make_node("Div", ["x", "largest"], ["share"]),
        helper.make_node("Mul", ["share", "tiny"], ["y"]),
    ]
    tiny = numpy_helper.from_array(helper.tensor_dtype_to_np_dtype(kind).type(1e-4), "tiny")
    return across_rows(repository, kind, columns, nodes, tiny)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make, kind)
        for make in (times_the_largest, sum_of_later_rows, sorted_rows)
        for kind in (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64)
    ]
    + [(tiny_share_of_the_largest, TensorProto.FLOAT)],
)
def test_rows_that_look_at_each_other_are_found_out_whatever_the_order_and_size(tmp_path, make, kind, columns):
    model = load(make(tmp_path, kind, columns))
    assert "not proven independent: node" in model.batchable.reason
    assert "other rows" in probed(model).reason


def test_an_embedding_of_two_words_is_batched(tmp_path):
    x, y = models.value("x", TensorProto.INT64, "n", 1), models.value("y", TensorProto.FLOAT, "n", 1)
    words = numpy_helper.from_array(np.array([1, 2], np.float32), "words")
    nodes = [helper.make_node("Gather", ["words", "x"], ["y"])]
    assert load(models.save(tmp_path, "embedding", nodes, [x], [y], [words])).batchable


def test_a_model_whose_rows_depend_on_each_other_is_not_batched(tmp_path):
    model = load(models.mean_over_rows(tmp_path))
    assert (bool(model.batchable), model.max_batch_rows) == (False, 1)
    assert "node 'mean' (ReduceMean): it reduces axis 0, along which the rows lie" in model.batchable.reason


def test_a_fixed_first_dimension_is_not_batched(tmp_path):
    assert "first dimension" in load(models.hidden_random(tmp_path)).batchable.reason


@pytest.mark.parametrize("damage", [b"", b"not a model", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_named_with_the_cause(tmp_path, damage):
    file = models.mlp(tmp_path) / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(ModelLoadError) as caught:
        load(file.parent)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def configured(folder, text):
    (folder.parent / "config.pbtxt").write_text(text)
    return load(folder)


def test_a_configured_batch_size_holds(tmp_path):
    assert configured(models.mlp(tmp_path), "max_batch_size: 3").max_batch_rows == 3


def test_a_configured_batch_size_of_0_turns_batching_off(tmp_path):
    model = configured(models.mlp(tmp_path), "max_batch_size: 0")
    assert (bool(model.batchable), model.max_batch_rows) == (False, 1)


def test_a_batch_size_for_a_model_that_cannot_batch_is_a_mistake(tmp_path):
    with pytest.raises(ModelLoadError, match=r"max_batch_size is 4.*not free"):
        configured(models.hidden_random(tmp_path), "max_batch_size: 4")


def test_the_owner_may_overrule_what_was_found_about_caching(tmp_path):
    assert configured(models.random(tmp_path / "a"), "response_cache { enable: true }").cacheable
    model = configured(models.mlp(tmp_path / "b"), "response_cache { enable: false }")
    assert not model.cacheable
    assert "config" in model.cacheable.reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('input { name: "z" }', ["'z'", "'x'"]),
        ('input { name: "x" data_type: TYPE_INT8 }', ["TYPE_INT8", "FP32"]),
        ('max_batch_size: 8 output { name: "y" dims: [11] }', ["[11]", "10"]),
        ('input { name: "x" dims: [8, 8] reshape { shape: [63] } }', ["'x'", "[63]", "64"]),
        ('input { name: "x" dims: [8, 7] reshape { shape: [64] } }', ["'x'", "[8, 7]", "[64]"]),
        ('input { name: "x" dims: [-1, 64] reshape { shape: [64] } }', ["'x'", "[-1, 64]", "[64]"]),
        ('input { name: "x" dims: [64] optional: true }', ["'x'", "optional"]),
    ],
)
def test_a_configuration_that_the_file_does_not_bear_out_is_a_mistake(tmp_path, text, words):
    with pytest.raises(ModelLoadError) as caught:
        configured(models.mlp(tmp_path), text)
    assert all(word in str(caught.value) for word in words)


def test_the_configuration_told_is_complete(tmp_path):
    config = load(models.mlp(tmp_path)).config()
    assert (config.name, config.platform, config.max_batch_size) == ("mlp", "onnxruntime_onnx", 8)
    assert [(tensor.name, list(tensor.dims)) for tensor in (*config.input, *config.output)] == [
        ("x", [64]),
        ("y", [10]),
    ]
    assert [*config.dynamic_batching.preferred_batch_size] == [8]
    assert config.parameters["ringmesh_cached"].string_value == "yes"


ADDED = """
    version_policy { latest { num_versions: 1 } }
    platform: "onnxruntime_onnx"
    backend: "onnxruntime"
    default_model_filename: "model.onnx"
    optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }
"""


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (
            """
            max_batch_size: 4
            input { name: "x" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [1, 8, 8] reshape { shape: [64] } }
            output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] label_filename: "labels.txt" }
            metric_tags { key: "a" value: "b" }
            parameters { key: "theirs" value { string_value: "kept" } }
            """,
            ADDED + 'instance_group { name: "mlp" kind: KIND_CPU count: 1 }',
        ),
        (
            """
            name: "mlp"
            version_policy { all { } }
            max_batch_size: 8
            input { name: "x" data_type: TYPE_FP32 dims: [64] }
            output { name: "y" data_type: TYPE_FP32 dims: [10] }
            dynamic_batching { max_queue_delay_microseconds: 5 default_queue_policy { max_queue_size: 9 } }
            instance_group { count: 2 kind: KIND_GPU gpus: [0] rate_limiter { priority: 2 } }
            instance_group { name: "second" }
            optimization { priority: PRIORITY_MAX graph { level: 1 } output_pinned_memory { enable: false } }
            response_cache { enable: false }
            model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: [64] random_data: true } } }
            """,
            """
            platform: "onnxruntime_onnx"
            backend: "onnxruntime"
            default_model_filename: "model.onnx"
            optimization { input_pinned_memory { enable: true } }
            max_batch_size: 8
            dynamic_batching { preferred_batch_size: 8 }
            """,
        ),
        (
            "",
            ADDED
            + """
            max_batch_size: 8
            input { name: "x" data_type: TYPE_FP32 dims: [64] }
            output { name: "y" data_type: TYPE_FP32 dims: [10] }
            dynamic_batching { preferred_batch_size: 8 }
            instance_group { name: "mlp" kind: KIND_CPU count: 1 }
            """,
        ),
    ],
)
def test_the_configuration_told_is_the_one_given_with_what_triton_adds(tmp_path, given, added):
    folder = models.mlp(tmp_path)
    (folder.parent / "labels.txt").write_text("cat")
    told = configured(folder, given).config()
    wanted = parse(given, "config.pbtxt", "mlp")
    wanted.MergeFrom(parse(f'{added} name: "mlp"', "added", "mlp"))
    wanted.response_cache.enable = wanted.response_cache.enable or not wanted.HasField("response_cache")
    for index, group in enumerate(wanted.instance_group):
        group.name, group.count = group.name or f"mlp_{index}", group.count or 1
        group.kind = group.kind or group.KIND_CPU
    for name in [name for name in told.parameters if name.startswith("ringmesh_")]:
        del told.parameters[name]
    assert told == wanted


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("max_batch_size: 4", (-1, 3, -1)),
        ('max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [3, 8] }', (-1, 3, 8)),
        ('max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [-1, 8] }', (-1, 3, 8)),
        ('input { name: "x" dims: [1, 3, 8] } output { name: "y" dims: [-1, 3, -1] }', (1, 3, 8)),
        ('input { name: "x" dims: [1, 3, 8] }', (-1, 3, 8)),
    ],
)
def test_a_configuration_may_fix_sizes_of_an_input_that_the_file_leaves_free(tmp_path, text, shape):
    x, y = (models.value(name, FLOAT, "n", 3, "m") for name in "xy")
    folder = models.save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    assert configured(folder, text).inputs["x"].shape == shape


def test_an_output_that_the_configuration_leaves_out_is_not_offered(tmp_path):
    model = configured(models.add_sub(tmp_path), 'output { name: "sum" data_type: TYPE_FP32 dims: [-1, 2] }')
    assert [*model.outputs] == ["sum"]
    assert [tensor.name for tensor in model.config().output] == ["sum"]


@pytest.mark.parametrize("dims", ["[1]", "[1, 1]"])
def test_ones_in_a_configuration_stand_for_a_scalar(tmp_path, dims):
    x, y = models.value("x", FLOAT), models.value("y", FLOAT)
    folder = models.save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    tensors = " ".join(f'{kind} {{ name: "{name}" dims: {dims} }}' for kind, name in (("input", "x"), ("output", "y")))
    model = configured(folder, tensors)
    given = np.full(model.inputs["x"].shape, 5, np.float32)
    (answer,) = model.run({"x": given}, ["y"])
    assert (answer.shape, answer.tolist()) == (given.shape, given.tolist())
    with pytest.raises(ModelLoadError, match=r"gives 'x' dims \[2\]; the file has \[\]"):
        configured(folder, 'input { name: "x" dims: [2] }')


def test_the_batch_is_not_in_the_dims_that_are_told(tmp_path):
    told = configured(models.mlp(tmp_path), 'input { name: "x" dims: [-1, 64] }').config()
    assert (told.max_batch_size, [*told.input[0].dims]) == (8, [64])


@pytest.mark.parametrize("more", ["", "dynamic_batching { }"])
def test_a_reshaped_model_is_served_in_the_shapes_of_its_configuration(tmp_path, more):
    plain = load(models.mlp(tmp_path))
    reshape = """
        max_batch_size: 4
        input { name: "x" data_type: TYPE_FP32 dims: [8, 8] reshape { shape: [64] } }
        output { name: "y" data_type: TYPE_FP32 dims: [2, 5] reshape { shape: [10] } }
    """
    model = configured(tmp_path / "mlp/1", reshape + more)
    assert (model.inputs["x"].shape, model.outputs["y"].shape, model.has_rows) == ((-1, 8, 8), (-1, 2, 5), True)
    told = model.config()
    assert ([*told.input[0].dims], [*told.input[0].reshape.shape]) == ([8, 8], [64])
    x = np.random.default_rng(0).random((3, 8, 8), np.float32)
    (expected,) = plain.run({"x": x.reshape(3, 64)}, ["y"])
    (answer,) = model.run({"x": x}, ["y"])
    assert answer.tobytes() == expected.tobytes()
    assert answer.shape == (3, 2, 5)


def test_free_dimensions_go_through_a_reshape_in_their_order(tmp_path):
    text = 'max_batch_size: 0 input { name: "x" dims: [-1, 1, -1] reshape { shape: [-1, -1] } }'
    model = configured(models.identity(tmp_path, "fp32"), text)
    (answer,) = model.run({"x": np.arange(6, dtype=np.float32).reshape(3, 1, 2)}, ["y"])
    assert answer.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_an_optional_input_may_be_left_out_or_given(tmp_path):
    model = configured(models.scaled(tmp_path), 'input { name: "scale" data_type: TYPE_FP32 dims: [1] optional: true }')
    assert (model.required, bool(model.batchable)) == (("x",), True)
    x = np.ones((1, 2), np.float32)
    assert model.run({"x": x}, ["y"])[0].tolist() == [[2, 2]]
    assert model.run({"x": x, "scale": np.array([5], np.float32)}, ["y"])[0].tolist() == [[5, 5]]
    assert [(tensor.name, tensor.optional) for tensor in model.config().input] == [("scale", True), ("x", False)]


def test_a_value_of_the_file_is_not_an_input_unless_it_is_offered(tmp_path):
    assert set(load(models.scaled(tmp_path)).inputs) == {"x"}
    with pytest.raises(ModelLoadError, match=r"'scale'.*say optional"):
        configured(tmp_path / "scaled/1", 'input { name: "scale" dims: [1] }')


@pytest.mark.filterwarnings("ignore:Specified provider")  # of a build that has none
def test_a_model_that_wants_a_gpu_answers_from_the_cpu_where_there_is_none(tmp_path, caplog):
    folder = models.mlp(tmp_path)
    (folder.parent / "config.pbtxt").write_text("instance_group { gpus: [ 0, 1 ] }")
    model = load(folder, ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"])
    assert model.provider == "CPUExecutionProvider"
    assert "model mlp/1: it runs on CPUExecutionProvider, without CUDAExecutionProvider" in caplog.text
    x = np.ones((1, 64), np.float32)
    assert (
        model.run({"x": x}, ["y"])[0].tobytes()
        == load(models.mlp(tmp_path / "plain")).run({"x": x}, ["y"])[0].tobytes()
    )


@pytest.mark.parametrize("level", [-1, 2])
def test_parameters_and_levels_reach_the_session(tmp_path, level):
    folder = models.mlp(tmp_path)
    (folder.parent / "config.pbtxt").write_text(
        f"""optimization {{ graph {{ level: {level} }} }}
        parameters {{ key: "execution_mode" value {{ string_value: "1" }} }}
        parameters {{ key: "enable_mem_arena" value {{ string_value: "0" }} }}
        parameters {{ key: "memory.enable_memory_arena_shrinkage" value {{ string_value: "cpu:0" }} }}""",
    )
    model = load(folder)
    with pytest.raises(Exception, match="arena"):
        # Only a session that was told both refuses: there is no arena to shrink.
        model.run({"x": np.ones((1, 64), np.float32)}, ["y"])


FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def failing(repository, case):
    """A model, and inputs with values or shapes that one of its nodes refuses when it runs."""
    x, y = models.value("x", FLOAT, "n"), models.value("y", FLOAT, None)
    sizes = models.value("s", INT, "k")
    four = numpy_helper.from_array(np.array([4], np.int64), "four")
    ones = np.ones(3, np.float32)
    match case:
        case "negative size":
            made = [helper.make_node("ConstantOfShape", ["s"], ["y"])], [sizes], [], {"s": np.array([-5])}
        case "too large a size":
            made = [helper.make_node("ConstantOfShape", ["s"], ["y"])], [sizes], [], {"s": np.array([1 << 62] * 2)}
        case "shape of the model":
            made = [helper.make_node("Reshape", ["x", "four"], ["y"])], [x], [four], {"x": ones}
        case "shape of the caller":
            made = [helper.make_node("Reshape", ["x", "s"], ["y"])], [x, sizes], [], {"x": ones, "s": np.array([2, 2])}
        case "sizes that differ":
            other = models.value("z", FLOAT, "m")
            made = [helper.make_node("Add", ["x", "z"], ["y"])], [x, other], [], {"x": ones, "z": ones[:2]}
        case "an index":
            table = numpy_helper.from_array(ones, "table")
            made = [helper.make_node("GatherElements", ["table", "s"], ["y"])], [sizes], [table], {"s": np.array([7])}
        case "no number":
            text = models.value("x", TensorProto.STRING, "n")
            made = [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], [text], [], {"x": np.array([b"two"], object)}
        case "in a branch":
            branches = [
                helper.make_graph(
                    [helper.make_node("Reshape", ["x", "four"], [name])], name, [], [models.value(name, FLOAT, None)]
                )
                for name in "ab"
            ]
            condition = models.value("condition", TensorProto.BOOL)
            branch = helper.make_node("If", ["condition"], ["y"], then_branch=branches[0], else_branch=branches[1])
            made = [branch], [x, condition], [four], {"x": ones, "condition": np.array(True)}
    nodes, inputs, initializers, values = made
    for node in nodes:
        node.name = "the node"
    return load(models.save(repository, "fails", nodes, inputs, [y], initializers)), values


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("negative size", r"'the node' \(ConstantOfShape\) fails: Tensor shape.Size\(\) must be >= 0"),
        ("too large a size", r"'the node' \(ConstantOfShape\) fails: Integer overflow"),
        ("shape of the model", r"\(Reshape\) fails: The input tensor cannot be reshaped to the requested shape"),
        ("shape of the caller", r"\(Reshape\) fails: The input tensor cannot be reshaped to the requested shape"),
        ("sizes that differ", r"\(Add\) fails: Attempting to broadcast"),
        ("an index", r"\(GatherElements\) fails: .*Out of range value"),
        ("no number", r"\(Cast\) fails: stod"),
        ("in a branch", r"a node \(Reshape\) fails: The input tensor cannot be reshaped"),
    ],
)
def test_a_node_that_refuses_what_the_caller_gave_is_told_with_its_reason_and_not_logged(tmp_path, caplog, case, words):
    model, values = failing(tmp_path, case)
    caplog.clear()
    with pytest.raises(InvalidArgumentError, match=rf"model 'fails' cannot run on these inputs: .*{words}") as caught:
        model.run(values, ["y"])
    assert caught.value.field == "inputs"
    assert "onnxruntime" not in caught.value.message
    assert not caplog.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            Fail("Non-zero status code returned while running Conv node. Name:'' Status Message: CUDNN failure 4"),
            "execution",
        ),
        (Fail("the session was closed"), "execution"),
        (RuntimeError("Unable to handle object of type <class 'int'>"), "execution"),
        (
            Fail("running Add node. Status Message: Failed to allocate memory for requested buffer of size 99"),
            "memory",
        ),
        (Fail("CUDA error cudaErrorMemoryAllocation:out of memory"), "memory"),
    ],
    ids=str,
)
def test_a_run_that_fails_for_no_fault_of_the_request_is_none_of_the_callers(error, kind):
    told = run_error("m", error)
    assert told.kind == kind
    assert isinstance(told, ResourceExhaustedError if kind == "memory" else InternalError)


@pytest.mark.parametrize("operator", ["GRU", "LSTM"])
def test_a_recurrent_model_refuses_a_request_without_rows_which_would_end_the_process(tmp_path, operator):
    gates = {"GRU": 3, "LSTM": 4}[operator]
    weights = [
        numpy_helper.from_array(np.ones((1, gates * 2, size), np.float32), name) for name, size in (("w", 4), ("r", 2))
    ]
    node = helper.make_node(operator, ["x", "w", "r"], ["y"], hidden_size=2)
    x = models.value("x", TensorProto.FLOAT, "s", "n", 4)
    y = models.value("y", TensorProto.FLOAT, "s", 1, "n", 2)
    models.save(tmp_path, "recurrent", [node], [x], [y], weights)
    model = load(tmp_path / "recurrent/1")
    assert model.run({"x": np.zeros((3, 1, 4), np.float32)}, ["y"])[0].shape == (3, 1, 1, 2)
    with pytest.raises(InvalidArgumentError, match=f"'x' has no elements.*{operator}"):
        model.run({"x": np.zeros((3, 0, 4), np.float32)}, ["y"])


@pytest.mark.parametrize(
    ("operator", "attributes", "shape"),
    [
        ("ConvTranspose", {"kernel_shape": [3, 3, 3]}, (1, 1, 0, 4, 4)),
        ("Unique", {"axis": 1}, (3, 0)),
        ("STFT", {}, (0,)),
    ],
)
def test_so_do_models_of_other_operators_that_would(tmp_path, operator, attributes, shape):
    arrays = {
        "ConvTranspose": [np.ones((1, 1, 3, 3, 3), np.float32)],
        "STFT": [np.ones((1, 8, 1), np.float32), np.array(1)],
    }.get(operator, [])
    weights = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    names = [weight.name for weight in weights]
    node = helper.make_node(operator, [*names, "x"] if operator == "STFT" else ["x", *names], ["y"], **attributes)
    x = models.value("x", TensorProto.FLOAT, *(f"x{axis}" for axis in range(len(shape))))
    y = models.value("y", TensorProto.FLOAT, *(f"y{axis}" for axis in range(4 if operator == "STFT" else len(shape))))
    models.save(tmp_path, "aborts", [node], [x], [y], weights)
    model = load(tmp_path / "aborts/1")
    model.run({"x": np.ones([max(size, 4) if size != 1 else 1 for size in shape], np.float32)}, ["y"])
    with pytest.raises(InvalidArgumentError, match=f"'x' has no elements.*{operator}"):
        model.run({"x": np.zeros(shape, np.float32)}, ["y"])
