"""Small ONNX models, each for one thing that a test asks."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IDENTITIES = {
    "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp32": TensorProto.FLOAT,
    "fp64": TensorProto.DOUBLE,
    "bytes": TensorProto.STRING,
}


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def save(repository: Path, name: str, nodes, inputs, outputs, initializers=(), version=1) -> Path:
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    folder = repository / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return folder


def identity(repository: Path, name: str) -> Path:
    """x[n,m] -> y[n,m] of the datatype."""
    kind = IDENTITIES[name]
    node = helper.make_node("Identity", ["x"], ["y"])
    return save(repository, f"identity_{name}", [node], [value("x", kind, "n", "m")], [value("y", kind, "n", "m")])


def mlp(repository: Path, *, seed=0, version=1, name="mlp") -> Path:
    """FP32 x[n,64] -> y[n,10]; `seed` makes its weights."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (64, 64), "b1": (64,), "w2": (64, 10), "b2": (10,)}
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), k) for k, s in shapes.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["y"]),
    ]
    x, y = value("x", TensorProto.FLOAT, "n", 64), value("y", TensorProto.FLOAT, "n", 10)
    return save(repository, name, nodes, [x], [y], weights, version)


def table(repository: Path, name: str, *, number: int, megabytes: int) -> Path:
    """INT64 x[n] -> FP32 y[n]: element x of a large table that begins with `number`."""
    values = np.zeros(megabytes << 18, np.float32)
    values[0] = number
    node = helper.make_node("Gather", ["values", "x"], ["y"])
    x, y = value("x", TensorProto.INT64, "n"), value("y", TensorProto.FLOAT, "n")
    return save(repository, name, [node], [x], [y], [numpy_helper.from_array(values, "values")])


def row_cached(repository: Path) -> Path:
    """As mlp; rows of a batch are cached one by one."""
    folder = mlp(repository, name="row_cached")
    flag = 'parameters { key: "ringmesh_row_cache" value { string_value: "true" } }'
    (folder.parent / "config.pbtxt").write_text(flag)
    return folder


def similar(repository: Path) -> Path:
    """FP32 x[n,64] -> y[n,10] as mlp; a vector is answered as one with a cosine of 0.99 with it was."""
    folder = mlp(repository, name="similar")
    threshold = 'parameters { key: "ringmesh_semantic_threshold" value { string_value: "0.99" } }'
    (folder.parent / "config.pbtxt").write_text(threshold)
    return folder


def words(repository: Path) -> Path:
    """BYTES x[n,m] of words -> FP32 y[n,8]: how often each of eight is among them."""
    pool = ["to", "be", "or", "not", "that", "is", "the", "question"]
    node = helper.make_node(
        "TfIdfVectorizer", ["x"], ["y"], mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0,
        ngram_counts=[0], ngram_indexes=range(len(pool)), pool_strings=pool,
    )  # fmt: skip
    x, y = value("x", TensorProto.STRING, "n", "m"), value("y", TensorProto.FLOAT, "n", len(pool))
    return save(repository, "words", [node], [x], [y])


def texts(repository: Path) -> Path:
    """BYTES x[n,m] -> y[n,m], the same; answered as a text was whose `words` have a cosine of 0.95."""
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = value("x", TensorProto.STRING, "n", "m"), value("y", TensorProto.STRING, "n", "m")
    folder = save(repository, "texts", [node], [x], [y])
    (folder.parent / "config.pbtxt").write_text(
        """
        parameters { key: "ringmesh_semantic_threshold" value { string_value: "0.95" } }
        parameters { key: "ringmesh_semantic_embedding" value { string_value: "words" } }
        """
    )
    return folder


def expiring(repository: Path, *, ttl: float, stale: float = 0, name="expiring") -> Path:
    """As mlp; answers are fresh for `ttl` seconds and given for `stale` more, and always kept in Redis too."""
    folder = mlp(repository, name=name)
    parameters = {"ringmesh_shared_tier": "always", "ringmesh_cache_ttl_seconds": ttl}
    if stale:
        parameters["ringmesh_cache_stale_seconds"] = stale
    (folder.parent / "config.pbtxt").write_text(
        "".join(
            f'parameters {{ key: "{name}" value {{ string_value: "{told}" }} }}\n' for name, told in parameters.items()
        )
    )
    return folder


def wide(repository: Path, operator: str) -> Path:
    """FP32 x[n,256] -> y[n,256], after 400 turns of `operator`, each a millionth of a second or more a row."""
    nodes = [
        helper.make_node(operator, ["x" if turn == 0 else f"t{turn}"], [f"t{turn + 1}" if turn < 399 else "y"])
        for turn in range(400)
    ]
    x, y = value("x", TensorProto.FLOAT, "n", 256), value("y", TensorProto.FLOAT, "n", 256)
    return save(repository, operator.lower(), nodes, [x], [y])


def turned(repository: Path) -> Path:
    """FP32 x[n], INT64 turns -> y[n] = x + turns, one at a time: its work depends on a value."""
    on, turn = value("on", TensorProto.BOOL), value("turn", TensorProto.INT64)
    before, after = value("before", TensorProto.FLOAT, "n"), value("after", TensorProto.FLOAT, "n")
    nodes = [helper.make_node("Identity", ["on"], ["go_on"]), helper.make_node("Add", ["before", "one"], ["after"])]
    body = helper.make_graph(nodes, "body", [turn, on, before], [value("go_on", TensorProto.BOOL), after])
    loop = helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)
    inputs = [value("x", TensorProto.FLOAT, "n"), value("turns", TensorProto.INT64)]
    one = numpy_helper.from_array(np.array([1], np.float32), "one")
    folder = save(repository, "turned", [loop], inputs, [value("y", TensorProto.FLOAT, "n")], [one])
    (folder.parent / "config.pbtxt").write_text("max_batch_size: 0")
    return folder


def add_sub(repository: Path) -> Path:
    """FP32 a, b [n,2] -> sum, difference [n,2]."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    names = {"in": ("a", "b"), "out": ("sum", "difference")}
    inputs, outputs = ([value(name, TensorProto.FLOAT, "n", 2) for name in names[side]] for side in ("in", "out"))
    return save(repository, "add_sub", nodes, inputs, outputs)


def scaled(repository: Path) -> Path:
    """FP32 x[n,2] -> y = x * scale; the file has scale[1] = 2, which a request may override."""
    scale = value("scale", TensorProto.FLOAT, 1)
    two = numpy_helper.from_array(np.array([2], np.float32), "scale")
    x, y = value("x", TensorProto.FLOAT, "n", 2), value("y", TensorProto.FLOAT, "n", 2)
    return save(repository, "scaled", [helper.make_node("Mul", ["x", "scale"], ["y"])], [x, scale], [y], [two])


def pipeline(repository: Path, *, parameters="") -> Path:
    """An ensemble: mlp's x[n,64] -> y[n,10], through doubled (y + y)."""
    y, doubled = value("a", TensorProto.FLOAT, "n", 10), value("b", TensorProto.FLOAT, "n", 10)
    save(repository, "doubled", [helper.make_node("Add", ["a", "a"], ["b"])], [y], [doubled])
    folder = repository / "pipeline/1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "config.pbtxt").write_text(
        """
        platform: "ensemble"
        max_batch_size: 8
        input { name: "in" data_type: TYPE_FP32 dims: [64] }
        output { name: "out" data_type: TYPE_FP32 dims: [10] }
        ensemble_scheduling {
          step { model_name: "doubled" input_map { key: "a" value: "between" } output_map { key: "b" value: "out" } }
          step { model_name: "mlp" input_map { key: "x" value: "in" } output_map { key: "y" value: "between" } }
        }
        """
        + parameters
    )
    return folder


def accumulator(repository: Path) -> Path:
    """FP32 x[n,1] -> sum[n,1] of a sequence; START and CORRID are controls, total_in and total_out its state."""
    names = {"start": TensorProto.INT32, "corrid": TensorProto.INT64, "total_in": TensorProto.FLOAT}
    nodes = [
        helper.make_node("Cast", ["start"], ["start_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "start_float"], ["keep"]),
        helper.make_node("Mul", ["total_in", "keep"], ["before"]),
        helper.make_node("Add", ["before", "x"], ["total_out"]),
        helper.make_node("Identity", ["total_out"], ["sum"]),
        helper.make_node("Identity", ["corrid"], ["which"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, "n", 1), *(value(name, kind, "n", 1) for name, kind in names.items())]
    outputs = [value(name, TensorProto.FLOAT, "n", 1) for name in ("sum", "total_out")]
    outputs.append(value("which", TensorProto.INT64, "n", 1))
    one = numpy_helper.from_array(np.array([[1]], np.float32), "one")
    folder = save(repository, "accumulator", nodes, inputs, outputs, [one])
    (folder.parent / "config.pbtxt").write_text(
        """
        max_batch_size: 8
        sequence_batching {
          max_sequence_idle_microseconds: 5000000
          control_input {
            name: "start"
            control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }
          }
          control_input {
            name: "corrid"
            control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 }
          }
          state { input_name: "total_in" output_name: "total_out" data_type: TYPE_FP32 dims: [1] }
        }
        """
    )
    return folder


def scoped(repository: Path) -> Path:
    """FP32 x[n,1] -> y[n,1], the same, whose answers tenants do not share."""
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = value("x", TensorProto.FLOAT, "n", 1), value("y", TensorProto.FLOAT, "n", 1)
    folder = save(repository, "scoped", [node], [x], [y])
    flag = 'parameters { key: "ringmesh_tenant_scope" value { string_value: "true" } }'
    (folder.parent / "config.pbtxt").write_text(flag)
    return folder


def random(repository: Path) -> Path:
    """FP32 x[n,1] -> y = x + noise: no two answers are the same."""
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    x, y = value("x", TensorProto.FLOAT, "n", 1), value("y", TensorProto.FLOAT, "n", 1)
    return save(repository, "random", nodes, [x], [y])


def hidden_random(repository: Path) -> Path:
    """The random operator stands in a branch of an If."""
    noisy = helper.make_graph(
        [helper.make_node("RandomUniform", [], ["r"], shape=[1, 1])], "then", [], [value("r", TensorProto.FLOAT, 1, 1)]
    )
    plain = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["p"])], "else", [], [value("p", TensorProto.FLOAT, 1, 1)]
    )
    nodes = [helper.make_node("If", ["condition"], ["y"], then_branch=noisy, else_branch=plain)]
    condition = numpy_helper.from_array(np.array(False), "condition")
    x, y = value("x", TensorProto.FLOAT, 1, 1), value("y", TensorProto.FLOAT, 1, 1)
    return save(repository, "hidden_random", nodes, [x], [y], [condition])


def slow(repository: Path, trips: int | None = 600, *, name="slow", config="", width=1) -> Path:
    """FP32 x[n,width] -> y[n,width] after a loop of many matrix products; without `trips`, of as many as x says."""
    rng = np.random.default_rng(0)
    side = 256
    weights = numpy_helper.from_array((rng.normal(size=(side, side)) / side**0.5).astype(np.float32), "w")
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m", "w"], ["product"]),
            helper.make_node("Tanh", ["product"], ["m_out"]),
            helper.make_node("Identity", ["go"], ["go_out"]),
        ],
        "body",
        [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("m", TensorProto.FLOAT, side, side)],
        [value("go_out", TensorProto.BOOL), value("m_out", TensorProto.FLOAT, side, side)],
    )
    start = numpy_helper.from_array(rng.normal(size=(side, side)).astype(np.float32), "start")
    told = [] if trips else [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["trips"], to=TensorProto.INT64),
    ]  # fmt: skip
    nodes = [
        *told,
        helper.make_node("Loop", ["trips", "go0", "start"], ["m_end"], body=body),
        helper.make_node("ReduceMean", ["m_end"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    initializers = [
        weights,
        start,
        numpy_helper.from_array(np.array(True), "go0"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    if trips:  # a quarter to a half of a millisecond each
        initializers.append(numpy_helper.from_array(np.array(trips, np.int64), "trips"))
    x, y = value("x", TensorProto.FLOAT, "n", width), value("y", TensorProto.FLOAT, "n", width)
    folder = save(repository, name, nodes, [x], [y], initializers)
    (folder.parent / "config.pbtxt").write_text(f"max_batch_size: 0 {config}")  # else it is probed at each load
    return folder


def mean_over_rows(repository: Path) -> Path:
    """FP32 x[n,2] -> y[n,2] minus the mean over all rows: no row can be computed without the others."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    x, y = value("x", TensorProto.FLOAT, "n", 2), value("y", TensorProto.FLOAT, "n", 2)
    return save(repository, "mean_over_rows", nodes, [x], [y])


def crashing(repository: Path) -> Path:
    """Kills the process that loads it: ONNX Runtime 1.32 reads trees by recursion, and this one is 60,000 deep."""
    depth = 60_000
    leaves = depth + 1
    nodes = depth + leaves
    tree = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        nodes_treeids=[0] * nodes,
        nodes_nodeids=range(nodes),
        nodes_featureids=[0] * nodes,
        nodes_values=[float(node) for node in range(nodes)],
        nodes_modes=["BRANCH_LEQ"] * depth + ["LEAF"] * leaves,
        nodes_truenodeids=[*range(1, depth), nodes - 1, *[0] * leaves],
        nodes_falsenodeids=[*range(depth, nodes - 1), *[0] * leaves],
        target_treeids=[0] * leaves,
        target_nodeids=range(depth, nodes),
        target_ids=[0] * leaves,
        target_weights=[1.0] * leaves,
        n_targets=1,
    )
    x, y = value("x", TensorProto.FLOAT, "n", 1), value("y", TensorProto.FLOAT, "n", 1)
    graph = helper.make_graph([tree], "crashing", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    folder = repository / "crashing/1"
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "model.onnx")
    return folder


def build(repository: Path) -> Path:
    """All that the system tests ask for."""
    for name in IDENTITIES:
        identity(repository, name)
    for make in (mlp, row_cached, similar, words, texts, add_sub, accumulator, pipeline, random, scoped, slow):
        make(repository)
    # The tests share routers: without this, Redis holds it or not by what earlier tests have measured.
    always = 'parameters { key: "ringmesh_shared_tier" value { string_value: "always" } }'
    for name in ("mlp", "identity_fp32"):
        (repository / name / "config.pbtxt").write_text(always)
    return repository
