"""Which runs may be made on the event loop: what the graph proves, and what the slowest of the recent runs took."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.inference.codec.request import Decoded
from services.inference.execution.graph import operator_types, read
from services.inference.execution.inline_runs import MOST_BYTES_OUT, QUICK_NS, InlineRuns, verdict
from tests import models
from tests.unit.inference.loaded import load

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
NODE = helper.make_node
SIZES = {"sizes": np.array([2, -1]), "one": np.array([1]), "scalar": np.array(3), "pads": np.array([0, 1, 0, 1])}


def body(inputs, nodes, outputs):
    return helper.make_graph(nodes, "body", inputs, outputs)


def loop():
    more, turn = models.value("more", TensorProto.BOOL), models.value("turn", INT64)
    x, y = models.value("before", FLOAT, "n", "m"), models.value("after", FLOAT, "n", "m")
    turned = [NODE("Identity", ["more"], ["on"]), NODE("Add", ["before", "before"], ["after"])]
    return NODE(
        "Loop", ["count", "", "x"], ["y"], body=body([turn, more, x], turned, [models.value("on", TensorProto.BOOL), y])
    )


def branches():
    made = [
        body([], [NODE(operator, ["x"], [operator])], [models.value(operator, FLOAT, "n", "m")])
        for operator in ("Neg", "Abs")
    ]
    return NODE("If", ["condition"], ["y"], then_branch=made[0], else_branch=made[1])


def save(folder, nodes, *, kind=FLOAT, functions=(), overridable=()):
    """A model of x[n,m], count, condition, computed[k] -> y; the constants of SIZES, `overridable` ones as inputs."""
    inputs = [models.value("x", kind, "n", "m")]
    for name, given, shape in (
        ("count", INT64, ()),
        ("condition", TensorProto.BOOL, ()),
        ("computed", INT64, ("k",)),
        *((name, INT64, SIZES[name].shape) for name in overridable),
    ):
        if any(name in node.input for node in nodes) or name in overridable:
            inputs.append(models.value(name, given, *shape))
    constants = [numpy_helper.from_array(array.astype(np.int64), name) for name, array in SIZES.items()]
    graph = helper.make_graph(nodes, "g", inputs, [models.value("y", kind, None)], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ours", 1), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions)
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


INLINE = {
    "elementwise": [NODE("Relu", ["x"], ["y"])],
    "constant sizes": [NODE("Reshape", ["x", "sizes"], ["y"])],
    "a Constant node": [NODE("Constant", [], ["s"], value_ints=[-1]), NODE("Reshape", ["x", "s"], ["y"])],
    "sizes from Shape": [
        NODE("Shape", ["x"], ["shape"]),
        NODE("Gather", ["shape", "scalar"], ["row"]),
        NODE("Unsqueeze", ["row", "one"], ["rows"]),
        NODE("Concat", ["rows", "sizes"], ["target"], axis=0),
        NODE("Expand", ["x", "target"], ["y"]),
    ],
    "constant pads": [NODE("Pad", ["x", "pads"], ["y"])],
    "zeros of a shape": [NODE("Shape", ["x"], ["shape"]), NODE("ConstantOfShape", ["shape"], ["y"])],
    "a reduction": [NODE("ReduceSum", ["x", "one"], ["y"])],
    "gathered by value": [NODE("Gather", ["x", "computed"], ["y"])],
    "a contributed operator": [NODE("Gelu", ["x"], ["y"], domain="com.microsoft")],
    "states of a recurrent layer": [NODE("LSTM", ["x", "x", "x", "", "", "x", "x"], ["y"], hidden_size=1)],
}
NOT_INLINE = {
    "Loop": ([loop()], "its graph holds Loop"),
    "If": ([branches()], "its graph holds If"),
    "Scan": ([NODE("Scan", ["x"], ["y"], num_scan_inputs=1, body=body([], [], []))], "holds Scan"),
    "NonZero": ([NODE("NonZero", ["x"], ["y"])], "holds NonZero"),
    "Compress": ([NODE("Compress", ["x", "condition"], ["y"])], "holds Compress"),
    "Unique": ([NODE("Unique", ["x"], ["y"])], "holds Unique"),
    "NonMaxSuppression": ([NODE("NonMaxSuppression", ["x", "x"], ["y"])], "holds NonMaxSuppression"),
    "a sequence": ([NODE("SequenceConstruct", ["x"], ["s"]), NODE("SequenceAt", ["s", "one"], ["y"])], "SequenceAt"),
    "an unknown domain": ([NODE("Relu", ["x"], ["y"], domain="ours")], "holds ours.Relu"),
    "a length from a value": ([NODE("Range", ["count", "count", "scalar"], ["y"])], "'count' of Range"),
    "zeros by value": ([NODE("ConstantOfShape", ["computed"], ["y"])], "'computed' of ConstantOfShape"),
    "expanded by value": ([NODE("Expand", ["x", "computed"], ["y"])], "'computed' of Expand"),
    "tiled by value": ([NODE("Tile", ["x", "computed"], ["y"])], "'computed' of Tile"),
    "reshaped by value": ([NODE("Reshape", ["x", "computed"], ["y"])], "'computed' of Reshape"),
    "resized by value": ([NODE("Resize", ["x", "", "", "computed"], ["y"])], "'computed' of Resize"),
    "padded by value": ([NODE("Pad", ["x", "computed"], ["y"])], "'computed' of Pad"),
    "one hot by value": ([NODE("OneHot", ["x", "count", "one"], ["y"])], "'count' of OneHot"),
    "sliced by value": ([NODE("Slice", ["x", "computed", "one"], ["y"])], "'computed' of Slice"),
    "the best few by value": ([NODE("TopK", ["x", "computed"], ["y", "i"])], "'computed' of TopK"),
    "lengths by value": ([NODE("LSTM", ["x", "x", "x", "", "computed"], ["y"], hidden_size=1)], "'computed' of LSTM"),
    "a size computed from values": (
        [NODE("Cast", ["x"], ["s"], to=INT64), NODE("Abs", ["s"], ["t"]), NODE("Expand", ["x", "t"], ["y"])],
        "'t' of Expand",
    ),
    "a function": ([NODE("Double", ["x"], ["y"], domain="ours")], "holds ours.Double"),
}


@pytest.mark.parametrize("what", INLINE)
def test_a_graph_whose_work_follows_from_shapes_may_run_inline(tmp_path, what):
    assert verdict(read(save(tmp_path, INLINE[what])))


@pytest.mark.parametrize("what", NOT_INLINE)
def test_a_graph_whose_work_may_depend_on_values_may_not(tmp_path, what):
    nodes, reason = NOT_INLINE[what]
    function = helper.make_function(
        "ours", "Double", ["a"], ["b"], [NODE("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    path = save(tmp_path, nodes, functions=[function] if what == "a function" else [])
    assert reason in verdict(read(path)).reason


def test_a_size_that_a_request_may_override_is_not_known(tmp_path):
    path = save(tmp_path, [NODE("Reshape", ["x", "sizes"], ["y"])], overridable=["sizes"])
    assert "'sizes' of Reshape" in verdict(read(path)).reason


def test_strings_are_not_read_on_the_event_loop(tmp_path):
    folder = tmp_path / "strings" / "1"
    folder.mkdir(parents=True)
    save(folder, [NODE("Identity", ["x"], ["y"])], kind=STRING)
    assert "strings" in load(folder).inline.reason


def test_operators_are_found_in_branches_and_functions_too(tmp_path):
    assert operator_types(read(save(tmp_path, [branches()]))) == {"If", "Neg", "Abs"}
    function = helper.make_function(
        "ours", "Double", ["a"], ["b"], [NODE("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    nodes = [NODE("Double", ["x"], ["y"], domain="ours")]
    assert operator_types(read(save(tmp_path, nodes, functions=[function]))) == {"ours.Double", "Add"}


def test_a_model_says_whether_its_runs_are_made_inline_and_why_not(tmp_path):
    folder = tmp_path / "looped" / "1"
    folder.mkdir(parents=True)
    save(folder, [loop()])
    mlp, looped = (
        load(one).config().parameters["ringmesh_inline"].string_value for one in (models.mlp(tmp_path), folder)
    )
    assert mlp == "yes"
    assert looped.startswith("no: ")
    assert looped.endswith("Loop")


def request(rows=1, columns=4):
    return Decoded({"x": np.zeros((rows, columns), np.float32)}, rows, ("y",), {}, {}, (columns,))


def seen(*runs, batchable=True, by_cpu=True, made=None):
    """InlineRuns after runs of (rows, wall ns, cpu ns, bytes out)."""
    made = made or InlineRuns(batchable=batchable, by_cpu=by_cpu)
    for rows, wall, cpu, size in runs:
        made.ran(request(rows), rows, wall, cpu, [np.zeros(size, np.uint8)])
    return made


QUICK, SLOW = (1, 10_000, 10_000, 40), (1, 2 * QUICK_NS, 2 * QUICK_NS, 40)


def test_nothing_runs_inline_before_it_was_seen_to_be_quick():
    runs = seen()
    assert not runs.allows(request(), 1)
    seen(QUICK, made=runs)
    assert runs.allows(request(), 1)
    assert not runs.allows(request(columns=5), 1)


def test_the_slowest_of_the_recent_runs_counts_and_not_their_mean():
    runs = seen(*[QUICK] * 40, SLOW, *[QUICK] * 30)
    assert not runs.allows(request(), 1)
    seen(*[QUICK] * 64, made=runs)
    assert runs.allows(request(), 1)


def test_more_rows_take_their_part_more():
    runs = seen(QUICK)
    most = QUICK_NS // 10_000
    assert runs.allows(request(most), most)
    assert not runs.allows(request(most + 1), most + 1)


def test_a_run_that_makes_too_much_is_not_inline():
    runs = seen((1, 10_000, 10_000, MOST_BYTES_OUT // 4))
    assert runs.allows(request(4), 4)
    assert not runs.allows(request(5), 5)


def test_without_rows_every_shape_is_learned_on_its_own():
    runs = seen(QUICK, batchable=False)
    assert runs.allows(request(), 1)
    assert not runs.allows(request(rows=2), 1)


def test_a_run_that_another_process_held_up_is_not_a_slow_one_unless_a_device_makes_it():
    held_up = (1, 20 * QUICK_NS, 10_000, 40)
    assert seen(held_up).allows(request(), 1)
    assert not seen(held_up, by_cpu=False).allows(request(), 1)
