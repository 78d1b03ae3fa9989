"""Random ONNX graphs of the operators that batching is proven for, with the values that they have for some rows.

Each node is tried in ONNX Runtime as it is added, so that every graph runs for ROWS rows.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROWS = 3
OPSETS = (12, 17, 21)
MOST_ELEMENTS = 3000
ML, MICROSOFT = "ai.onnx.ml", "com.microsoft"
# Small whole numbers: sums of them are exact in any order.
_WHOLE = (-3, 4)
UNARY = [
    "Abs",
    "Neg",
    "Relu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Floor",
    "Ceil",
    "Sign",
    "Erf",
    "Softplus",
    "Elu",
    "Identity",
    "LeakyRelu",
    "HardSigmoid",
    "Reciprocal",
    "Sin",
    "Cos",
]
BINARY = ["Add", "Sub", "Mul", "Max", "Min", "Add", "Mul", "Div"]
REDUCTIONS = ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd"]


@dataclass
class Graph:
    """`arrays`: what each tensor is for ROWS rows."""

    random: random.Random
    opset: int
    nodes: list = field(default_factory=list)
    initializers: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)

    def constant(self, array):
        name = f"c{len(self.initializers)}"
        self.initializers[name] = self.arrays[name] = np.asarray(array)
        return name

    def floats(self, *shape):
        values = np.array([self.random.randrange(*_WHOLE) for _ in range(int(np.prod(shape)))], np.float32)
        return self.constant(values.reshape(shape))

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def pick(self, kind="f", least=0, most=4):
        """A tensor that was made so far, the later the likelier; None if there is no such."""
        found = [
            name
            for name, array in self.arrays.items()
            if array.dtype.kind == kind and least <= array.ndim <= most and name not in self.initializers
        ]
        return found[-1 - int(self.random.expovariate(0.6)) % len(found)] if found else None

    def add(self, operator, inputs, *, domain="", outputs=1, **attributes):
        """The names of its outputs. Raises whatever ONNX Runtime raises, and ValueError for sizes not wanted."""
        names = [f"t{len(self.nodes)}_{place}" for place in range(outputs)]
        node = helper.make_node(operator, inputs, names, domain=domain, **attributes)
        used = {name: self.arrays[name] for name in captured(node) if name in self.arrays}
        model = as_model([node], used, {}, names, self.opset, shapes=True)
        made = session(model).run(names, used)
        # Without elements some operators of ONNX Runtime end the process.
        if any(not 0 < array.size <= MOST_ELEMENTS or array.ndim > 5 for array in made):
            raise ValueError("too large, or empty")
        self.nodes.append(node)
        self.arrays.update(zip(names, made, strict=True))
        return names[0] if outputs == 1 else names


def captured(node):
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = set()
            for one in graph.node:
                names |= captured(one) - inner
                inner |= set(one.output)
    return names


def as_model(nodes, inputs, initializers, outputs, opset, *, shapes=False):
    """`inputs`: arrays by name; of each the first dimension is free, or with `shapes` none."""
    made = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape if shapes else ["n", *array.shape[1:]]
        )
        for name, array in inputs.items()
    ]
    graph = helper.make_graph(
        nodes,
        "random",
        made,
        [helper.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(ML, 3), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def same(one, other):
    """Within the tolerance of floats; of each tensor relative to its largest."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    finite = np.abs(one[np.isfinite(one)]).max(initial=0)
    return bool(np.allclose(one, other, rtol=1e-3, atol=1e-4 * min(finite, 1e30), equal_nan=True))


def draw_inputs(rng, graph_inputs, rows):
    """Rows of small whole numbers, each row times a power of two of its own."""
    made = {}
    for name, (kind, shape) in graph_inputs.items():
        full = (rows, *shape)
        if kind == "i":
            made[name] = rng.integers(0, 3, full)
        elif kind == "s":
            made[name] = np.array(
                [" ".join("abc"[: 1 + int(n)]) for n in rng.integers(0, 3, int(np.prod(full)))], object
            )
            made[name] = made[name].reshape(full)
        else:
            scale = 2.0 ** rng.integers(-3, 5, (rows, *[1] * len(shape)))
            made[name] = (rng.integers(*_WHOLE, full) * scale).astype(np.float32)
    return made


def random_graph(seed, size=7):
    """A graph of about `size` nodes."""
    choose = random.Random(seed)
    graph = Graph(choose, choose.choice(OPSETS))
    shapes = [(), (2,), (4,), (3,), (2, 4), (4, 2), (3, 3), (2, 3, 4), (2, 4, 4), (1, 4)]
    graph.inputs = {"x": ("f", choose.choice(shapes)), "i": ("i", choose.choice([(), (2,), (4,), (3,)]))}
    if choose.random() < 0.6:
        graph.inputs["z"] = ("f", choose.choice([graph.inputs["x"][1], choose.choice(shapes)]))
    if choose.random() < 0.1:
        graph.inputs["s"] = ("s", choose.choice([(), (2,)]))
    graph.arrays = draw_inputs(np.random.default_rng(seed), graph.inputs, ROWS)
    made = 0
    for _ in range(size * 6):
        if made >= size:
            break
        count = len(graph.nodes), len(graph.initializers)
        try:
            if choose.choice(MAKERS)(graph) is not None:
                made += 1
        except Exception:  # ONNX Runtime refuses it, or there is no fitting tensor
            undo(graph, *count)
    return graph


def undo(graph, nodes, initializers):
    for node in graph.nodes[nodes:]:
        for name in node.output:
            graph.arrays.pop(name, None)
    del graph.nodes[nodes:]
    for name in list(graph.initializers)[initializers:]:
        del graph.initializers[name], graph.arrays[name]


MAKERS = []


def maker(weight=1):
    def register(function):
        MAKERS.extend([function] * weight)
        return function

    return register


def axis_of(g, name, extra=0):
    rank = g.arrays[name].ndim + extra
    return g.random.randrange(-rank, rank)


@maker(3)
def unary(g):
    return g.add(g.random.choice(UNARY), [g.pick()])


@maker(5)
def binary(g):
    a = g.pick()
    shape = list(g.arrays[a].shape)
    if g.random.random() < 0.5:
        b = g.pick()
    else:
        shape = [size if g.random.random() < 0.6 else 1 for size in shape][g.random.randrange(len(shape) + 1) :]
        b = g.floats(*shape)
    pair = [a, b] if g.random.random() < 0.7 else [b, a]
    return g.add(g.random.choice(BINARY), pair)


@maker()
def compare_and_choose(g):
    a, b = g.pick(), g.pick()
    condition = g.add(g.random.choice(["Less", "Greater", "Equal"]), [a, g.random.choice([b, g.floats()])])
    return g.add("Where", [condition, a, g.random.choice([b, g.floats()])])


@maker(2)
def matmul(g):
    a = g.pick(least=1)
    last = g.arrays[a].shape[-1]
    kind = g.random.randrange(4)
    if kind == 0:
        return g.add("MatMul", [a, g.floats(*g.random.choice([(last, 3), (last,), (2, last, 2), (1, last, 2)]))])
    if kind == 1:
        size = g.arrays[a].shape[-2]
        return g.add("MatMul", [g.floats(2, size), a])
    if kind == 2:
        b = g.pick(least=2)
        order = list(range(g.arrays[b].ndim))
        order[-1], order[-2] = order[-2], order[-1]
        return g.add("MatMul", [a, g.add("Transpose", [b], perm=order)])
    return g.add("MatMul", [a, g.pick(least=1)])


@maker()
def gemm(g):
    a = g.pick(least=2, most=2)
    flip = g.random.randrange(2)
    depth = g.arrays[a].shape[0 if flip else 1]
    rows = g.arrays[a].shape[1 if flip else 0]
    added = g.random.choice([(3,), (1, 3), (rows, 1), (1,), (rows, 3)])
    return g.add("Gemm", [a, g.floats(depth, 3), g.floats(*added)], transA=flip)


@maker()
def fused_matmul(g):
    a, b = g.pick(least=2), g.pick(least=2)
    return g.add("FusedMatMul", [a, b], domain=MICROSOFT, transA=g.random.randrange(2), transB=g.random.randrange(2))


@maker(2)
def einsum(g):
    a = g.pick(least=1, most=3)
    letters = "abcd"[: g.arrays[a].ndim]
    if g.random.random() < 0.5:
        b, other = g.pick(least=1, most=3), None
        other = "".join(g.random.sample("abcde", g.arrays[b].ndim))
    else:
        other = "".join(g.random.sample(letters, g.random.randrange(1, len(letters) + 1)))
        b = g.floats(*(g.arrays[a].shape[letters.index(one)] for one in other))
    pool = sorted(set(letters + other))
    out = "".join(g.random.sample(pool, g.random.randrange(len(pool) + 1)))
    return g.add(
        "Einsum", [a, b], equation=f"{letters},{other}->{out}" if g.random.random() < 0.8 else f"{letters},{other}"
    )


@maker(2)
def reduce(g):
    a = g.pick(least=1)
    operator = g.random.choice(REDUCTIONS)
    options = {"keepdims": g.random.randrange(2)}
    axes = [axis_of(g, a)] if g.random.random() < 0.85 else None
    if g.opset >= 18:
        return g.add(operator, [a, g.ints(*axes)] if axes else [a], **options)
    return g.add(operator, [a], **options, **({"axes": axes} if axes else {}))


@maker()
def reduce_sum(g):
    a = g.pick(least=1)
    if g.opset < 13:
        return g.add("ReduceSum", [a], axes=[axis_of(g, a)], keepdims=g.random.randrange(2))
    return g.add("ReduceSum", [a, g.ints(axis_of(g, a))], keepdims=g.random.randrange(2))


@maker()
def arg(g):
    a = g.pick(least=1)
    options = {"axis": axis_of(g, a)} if g.random.random() < 0.8 else {}
    return g.add(g.random.choice(["ArgMax", "ArgMin"]), [a], keepdims=g.random.randrange(2), **options)


@maker(2)
def softmax(g):
    a = g.pick(least=1)
    options = {"axis": axis_of(g, a)} if g.random.random() < 0.8 else {}
    return g.add(g.random.choice(["Softmax", "LogSoftmax", "Hardmax", "LpNormalization"]), [a], **options)


@maker(2)
def normalise(g):
    a = g.pick(least=2)
    shape = g.arrays[a].shape
    kind = g.random.randrange(4)
    if kind == 0 and g.opset >= 17:
        axis = axis_of(g, a)
        return g.add("LayerNormalization", [a, g.floats(*shape[axis:])], axis=axis)
    if kind == 1:
        scale = [
            g.constant(np.array([g.random.randrange(1, 4) for _ in range(shape[1])], np.float32)) for _ in range(4)
        ]
        return g.add("BatchNormalization", [a, *scale])
    if kind == 2:
        return g.add("InstanceNormalization", [a, g.floats(shape[1]), g.floats(shape[1])])
    axes = sorted({axis_of(g, a) % len(shape) for _ in range(2)})
    return g.add("MeanVarianceNormalization", [a], axes=axes)


@maker()
def batch_norm_training(g):
    a = g.pick(least=2)
    scale = [g.constant(np.ones(g.arrays[a].shape[1], np.float32)) for _ in range(4)]
    if g.opset < 14:
        return None
    return g.add("BatchNormalization", [a, *scale], training_mode=1, outputs=3)[0]


@maker(3)
def transpose(g):
    a = g.pick(g.random.choice("ffi"), least=1)
    order = list(range(g.arrays[a].ndim))
    g.random.shuffle(order)
    return g.add("Transpose", [a], perm=order)


@maker(4)
def reshape(g):
    a = g.pick(g.random.choice("fffi"), least=1)
    shape = list(g.arrays[a].shape)
    kind = g.random.randrange(4)
    if kind == 0:
        target = [-1, *g.random.choice([[], [2], [4], [3], [2, 2], [1], [shape[-1]], [1, shape[-1]]])]
    elif kind == 1:
        target = [0] * min(len(shape), g.random.randrange(1, 3)) + [-1] + g.random.choice([[], [2], [1], [4]])
    elif kind == 2:
        g.random.shuffle(shape)
        target = [*shape]
        target[g.random.randrange(len(target))] = -1
    else:
        place = g.random.randrange(len(shape))
        size = shape.pop(place)
        part = g.random.choice([n for n in range(1, size + 1) if size % n == 0])
        target = [*shape[:place], part, size // part, *shape[place:]]
        target[g.random.randrange(len(target))] = -1
    return g.add("Reshape", [a, g.ints(*target)])


def size_of(g, name, axis):
    """One element of Shape, as a vector of length 1."""
    shape = g.add("Shape", [name])
    if g.random.random() < 0.5:
        return g.add("Gather", [shape, g.ints(axis)])
    scalar = g.add("Gather", [shape, g.constant(np.array(axis, np.int64))])
    return g.add("Reshape", [scalar, g.ints(1)])


@maker(6)
def shape_chain(g):
    """A shape computed from sizes of tensors, constants and products, for what takes one."""
    a = g.pick(least=1)
    b = g.pick(g.random.choice("fi"), least=1)
    shape = list(g.arrays[a].shape)
    parts = []
    kind = g.random.randrange(4)
    if kind == 0:
        cut = g.random.randrange(1, len(shape) + 1)
        parts = [size_of(g, a, axis) for axis in range(cut)]
        if g.random.random() < 0.5 and len(parts) > 1:
            parts = [g.add("Mul", parts[:2]), *parts[2:]]
        parts.append(g.ints(-1))
        return g.add("Reshape", [a, g.add("Concat", parts, axis=0)])
    parts = [
        g.random.choice(
            [
                lambda: size_of(g, b, g.random.randrange(g.arrays[b].ndim)),
                lambda: size_of(g, b, 0),
                lambda: g.ints(g.random.choice([1, 2, 3])),
                lambda: g.add("Mul", [size_of(g, b, 0), g.ints(2)]),
                lambda: g.add("Add", [size_of(g, b, -1), g.ints(1)]),
            ]
        )()
        for _ in range(g.random.randrange(1, 4))
    ]
    target = g.add("Concat", parts, axis=0)
    if kind == 1:
        return g.add("Expand", [g.random.choice([a, g.floats(1), g.floats(2), g.floats(1, 2)]), target])
    if kind == 2:
        filled = g.add("ConstantOfShape", [target], value=numpy_helper.from_array(np.array([2], np.float32)))
        return g.add("Add", [filled, a]) if g.random.random() < 0.5 else filled
    return g.add("Tile", [g.random.choice([a, g.floats(*[1] * len(parts)), g.floats(*[2] * len(parts))]), target])


@maker()
def shape_as_value(g):
    a = g.pick(least=1)
    size = g.add("Cast", [size_of(g, a, g.random.randrange(g.arrays[a].ndim))], to=TensorProto.FLOAT)
    return g.add(g.random.choice(["Add", "Div"]), [g.pick(), size])


@maker()
def all_elements(g):
    size = g.add("Cast", [g.add("Size", [g.pick()])], to=TensorProto.FLOAT)
    return g.add("Mul", [g.pick(), size])


@maker()
def flatten(g):
    a = g.pick(least=1)
    return g.add("Flatten", [a], axis=g.random.randrange(g.arrays[a].ndim + 1))


@maker(2)
def squeeze(g):
    a = g.pick(g.random.choice("ffi"), least=0)
    if g.random.random() < 0.5:
        axes = [axis_of(g, a, 1)]
        return g.add("Unsqueeze", [a, g.ints(*axes)]) if g.opset >= 13 else g.add("Unsqueeze", [a], axes=axes)
    ones = [axis for axis, size in enumerate(g.arrays[a].shape) if size == 1]
    if not ones or g.random.random() < 0.2:
        return g.add("Squeeze", [a])
    return g.add("Squeeze", [a, g.ints(ones[0])]) if g.opset >= 13 else g.add("Squeeze", [a], axes=ones[:1])


@maker(2)
def concat(g):
    a = g.pick(g.random.choice("ffi"), least=1)
    kind = g.arrays[a].dtype.kind
    b = g.random.choice([a, g.pick(kind, least=1), g.pick(kind, least=1)])
    if g.random.random() < 0.2:
        b = g.constant(np.ones(g.arrays[a].shape, g.arrays[a].dtype))
    return g.add("Concat", [a, b], axis=axis_of(g, a))


@maker()
def split(g):
    a = g.pick(least=1)
    axis = axis_of(g, a)
    if g.opset >= 18:
        return g.add("Split", [a], axis=axis, outputs=2, num_outputs=2)[0]
    return g.add("Split", [a], axis=axis, outputs=2)[0]


@maker(3)
def slice_(g):
    a = g.pick(g.random.choice("ffi"), least=1)
    axis = axis_of(g, a)
    ends = [g.random.choice([1, 2, -1, 3, 2**31 - 1, 2**63 - 1, -2])]
    start, step = g.random.choice([0, 0, 0, 1, -1]), g.random.choice([1, 1, 1, 2, -1])
    if g.random.random() < 0.4:
        b = g.pick(g.random.choice("fi"), least=1)
        return g.add("Slice", [a, g.ints(start), size_of(g, b, g.random.randrange(g.arrays[b].ndim)), g.ints(axis)])
    return g.add("Slice", [a, g.ints(start), g.ints(*ends), g.ints(axis), g.ints(step)])


@maker()
def pad(g):
    a = g.pick(least=1)
    rank = g.arrays[a].ndim
    amounts = [0] * 2 * rank
    amounts[g.random.randrange(2 * rank)] = g.random.choice([1, 2, -1, 0])
    return g.add("Pad", [a, g.ints(*amounts)], mode=g.random.choice(["constant", "edge"]))


@maker()
def tile(g):
    a = g.pick(least=1)
    repeats = [1] * g.arrays[a].ndim
    repeats[g.random.randrange(len(repeats))] = g.random.choice([1, 2])
    return g.add("Tile", [a, g.ints(*repeats)])


@maker(4)
def gather(g):
    kind = g.random.randrange(4)
    if kind == 0:
        return g.add("Gather", [g.floats(3, 2), g.pick("i")], axis=0)
    if kind == 1:
        return g.add("Gather", [g.floats(2, 3), g.pick("i")], axis=1)
    a = g.pick(least=1)
    index = g.random.choice([g.ints(0), g.ints(0, 1), g.constant(np.array(0)), g.pick("i")])
    return g.add("Gather", [a, index], axis=axis_of(g, a))


@maker(2)
def gather_elements(g):
    i = g.pick("i", least=1)
    a = g.random.choice([g.pick(least=1), g.floats(*[3] * g.arrays[i].ndim)])
    return g.add("GatherElements", [a, i], axis=axis_of(g, i))


@maker(2)
def gather_nd(g):
    i = g.pick("i", least=1)
    a = g.random.choice([g.pick(least=1), g.floats(3, 3, 3)])
    return g.add("GatherND", [a, i], batch_dims=g.random.choice([0, 0, 1]))


@maker(2)
def own_position(g):
    """What exporters make of x[range(rows), indices]."""
    a, i = g.pick(least=2), g.pick("i", least=1, most=1)
    size = g.add("Reshape", [size_of(g, g.random.choice([a, i]), 0), g.constant(np.array([], np.int64))])
    rows = g.add("Range", [g.constant(np.array(0)), size, g.constant(np.array(1))])
    if g.random.random() < 0.2:
        return g.add("Gather", [a, rows])
    if g.random.random() < 0.2:
        rows = g.add(g.random.choice(["Add", "Max", "Mul"]), [rows, g.random.choice([i, g.ints(1), g.ints(0)])])
        return g.add("Gather", [a, rows]) if g.random.random() < 0.5 else rows
    if g.random.random() < 0.4:
        step = size_of(g, a, 1)
        offset = g.random.choice([g.add("ArgMax", [a], axis=1, keepdims=0), i, g.ints(0, 1), g.ints(0, 3)])
        column = g.add("Reshape", [rows, g.ints(-1, *[1] * (g.arrays[offset].ndim - 1))])
        index = g.add("Add", [g.add("Mul", [column, g.random.choice([step, g.ints(2)])]), offset])
        flat = g.add("Reshape", [a, g.ints(-1, *g.arrays[a].shape[2:])])
        return g.add("Gather", [flat, index])
    pair = [g.add("Reshape", [one, g.ints(-1, 1)]) for one in (rows, i)]
    if g.random.random() < 0.2:
        pair.reverse()
    return g.add("GatherND", [a, g.add("Concat", pair, axis=-1)])


@maker(2)
def scatter(g):
    i = g.pick("i", least=1)
    a = g.pick(least=g.arrays[i].ndim, most=g.arrays[i].ndim)
    if g.random.random() < 0.5:
        updates = g.pick(least=1)
        return g.add("ScatterElements", [a, i, updates], axis=axis_of(g, i))
    shape = g.arrays[a].shape
    return g.add("ScatterND", [a, g.ints(0).__str__() and g.constant(np.array([[0]])), g.floats(1, *shape[1:])])


@maker()
def scatter_nd_along(g):
    a = g.pick(least=2, most=3)
    moved = g.add("Transpose", [a], perm=[1, 0, *range(2, g.arrays[a].ndim)])
    part = g.add("Slice", [moved, g.ints(0), g.ints(1), g.ints(0)])
    return g.add("ScatterND", [moved, g.constant(np.array([[1]])), part])


@maker(2)
def windows(g):
    a = g.pick(least=3)
    shape = g.arrays[a].shape
    kind = g.random.randrange(6)
    places = len(shape) - 2
    if kind == 0:
        return g.add("Conv", [a, g.floats(2, shape[1], *[2] * places)], pads=[1] * 2 * places)
    if kind == 1:
        return g.add("ConvTranspose", [a, g.floats(shape[1], 2, *[2] * places)])
    if kind == 2:
        return g.add("MaxPool", [a], kernel_shape=[2] * places, outputs=2)[0]
    if kind == 3:
        return g.add("AveragePool", [a], kernel_shape=[2] * places, ceil_mode=g.random.randrange(2))
    return g.add(g.random.choice(["GlobalAveragePool", "GlobalMaxPool"]), [a])


@maker()
def resize(g):
    a = g.pick(least=3)
    scales = [1.0] * g.arrays[a].ndim
    scales[g.random.randrange(len(scales))] = g.random.choice([1.0, 2.0])
    return g.add("Resize", [a, "", g.constant(np.array(scales, np.float32))], mode="nearest")


@maker()
def resize_to(g):
    a = g.pick(least=3)
    sizes = [size_of(g, a, axis) for axis in range(g.arrays[a].ndim)]
    sizes[g.random.randrange(len(sizes))] = g.ints(4)
    return g.add("Resize", [a, "", "", g.add("Concat", sizes, axis=0)], mode=g.random.choice(["nearest", "linear"]))


@maker()
def depth_to_space(g):
    return g.add(g.random.choice(["DepthToSpace", "SpaceToDepth"]), [g.pick(least=4)], blocksize=2)


@maker()
def along_axis(g):
    a = g.pick(least=1)
    kind = g.random.randrange(4)
    if kind == 0:
        return g.add("CumSum", [a, g.constant(np.array(axis_of(g, a)))])
    if kind == 1:
        return g.add("TopK", [a, g.ints(1)], axis=axis_of(g, a), outputs=2)[0]
    if kind == 2 and g.opset >= 14:
        return g.add("Trilu", [a], upper=g.random.randrange(2))
    return g.add("TopK", [a, size_of(g, a, 0)], axis=axis_of(g, a), outputs=2)[0]


@maker()
def one_hot(g):
    i = g.pick("i")
    depth = g.random.choice([g.constant(np.array(3)), size_of(g, g.pick(least=1), 0)])
    return g.add("OneHot", [i, depth, g.constant(np.array([0, 1], np.float32))], axis=axis_of(g, i, 1))


@maker()
def over_all(g):
    kind = g.random.randrange(5)
    if kind == 0:
        return g.add("EyeLike", [g.pick(least=2, most=2)])
    if kind == 1:
        return g.add("NonZero", [g.pick(least=1)])
    if kind == 2:
        return g.add("Unique", [g.pick(least=1)])
    if kind == 3:
        a = g.pick()
        quantised, scale, zero = g.add("DynamicQuantizeLinear", [a], outputs=3)
        return g.add("DequantizeLinear", [quantised, scale, zero])
    a = g.pick(least=1)
    condition = g.constant(np.array([True, False]))
    return g.add("Compress", [a, condition], **({"axis": axis_of(g, a)} if g.random.random() < 0.8 else {}))


@maker()
def quantise(g):
    a = g.pick(least=1)
    axis = axis_of(g, a)
    size = g.arrays[a].shape[axis]
    scale = np.float32(0.5) if g.random.random() < 0.5 else np.arange(1, size + 1, dtype=np.float32)
    zero = np.zeros(np.shape(scale), np.uint8)
    options = {"axis": axis} if g.opset >= 13 else {}
    names = [g.constant(scale), g.constant(zero)]
    return g.add("DequantizeLinear", [g.add("QuantizeLinear", [a, *names], **options), *names], **options)


@maker(2)
def recurrent(g):
    a = g.pick(least=3, most=3)
    operator, gates = g.random.choice([("RNN", 1), ("GRU", 3), ("LSTM", 4)])
    width, batch = g.arrays[a].shape[2], g.arrays[a].shape[1]
    weights = [g.floats(1, 2 * gates, size) for size in (width, 2)]
    lengths = g.random.choice(["", "", g.constant(np.ones(batch, np.int32)), own_lengths(g)])
    state = g.random.choice(["", "", g.floats(1, batch, 2)])
    return g.add(operator, [a, *weights, "", lengths, state], hidden_size=2, outputs=2)[g.random.randrange(2)]


def own_lengths(g):
    i = g.pick("i", least=1, most=1)
    return g.add("Cast", [g.add("Min", [i, g.ints(1)])], to=TensorProto.INT32)


@maker()
def reverse_sequence(g):
    a, i = g.pick(least=2), g.pick("i", least=1, most=1)
    lengths = g.random.choice([g.add("Max", [i, g.ints(1)]), g.constant(np.ones(g.arrays[a].shape[1], np.int64))])
    axes = g.random.choice([(0, 1), (1, 0)])
    return g.add("ReverseSequence", [a, lengths], batch_axis=axes[0], time_axis=axes[1])


@maker(2)
def if_(g):
    a, b = g.pick(), g.pick()
    if g.random.random() < 0.5:
        total = g.add("ReduceSum", [g.random.choice([a, g.floats(2)])], keepdims=0)
        condition = g.add("Greater", [total, g.floats()])
    else:
        axis = g.random.randrange(max(g.arrays[a].ndim, 1))
        size = g.add("Reshape", [size_of(g, a, axis), g.constant(np.array([], np.int64))])
        condition = g.add(
            g.random.choice(["Equal", "Greater"]), [size, g.constant(np.array(g.random.choice([1, 3, 0, -1])))]
        )
    branches = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node(operator, inputs, [f"{branch}_{len(g.nodes)}"])],
            branch,
            [],
            [helper.ValueInfoProto(name=f"{branch}_{len(g.nodes)}")],
        )
        for branch, operator, inputs in (
            ("then", "Add", [a, b]),
            ("else", g.random.choice(["Neg", "Softmax", "Identity"]), [a]),
        )
    }
    return g.add("If", [condition], **branches)


@maker(2)
def loop(g):
    a, b = g.pick(least=1), g.pick()
    mark = len(g.nodes)
    operator = g.random.choice(["Add", "Mul", "Concat"])
    options = {"axis": axis_of(g, a)} if operator == "Concat" else {}
    kind = TensorProto.FLOAT
    body = helper.make_graph(
        [
            helper.make_node(operator, [f"s{mark}", b], [f"s{mark}_out"], **options),
            helper.make_node("Identity", [f"go{mark}"], [f"go{mark}_out"]),
            helper.make_node("Identity", [f"s{mark}"], [f"scan{mark}"]),
        ],
        "body",
        [
            helper.make_tensor_value_info(f"i{mark}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"go{mark}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"s{mark}", kind, None),
        ],
        [
            helper.make_tensor_value_info(f"go{mark}_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"s{mark}_out", kind, None),
            helper.make_tensor_value_info(f"scan{mark}", kind, None),
        ],
    )
    trips = g.random.choice([g.constant(np.array(2)), g.add("Size", [b]), g.constant(np.array(1))])
    state, collected = g.add("Loop", [trips, g.constant(np.array(True)), a], body=body, outputs=2)
    return g.random.choice([state, collected])


@maker()
def scan(g):
    a = g.pick(least=2)
    axis, mark = g.random.randrange(g.arrays[a].ndim), len(g.nodes)
    shape = [size for place, size in enumerate(g.arrays[a].shape) if place != axis]
    start = g.random.choice(
        [g.floats(*shape), g.add("ReduceMax", [a, g.ints(axis)], keepdims=0)] if g.opset >= 18 else [g.floats(*shape)]
    )
    kind = TensorProto.FLOAT
    body = helper.make_graph(
        [
            helper.make_node("Add", [f"s{mark}", f"x{mark}"], [f"s{mark}_out"]),
            helper.make_node("Relu", [f"s{mark}_out"], [f"scan{mark}"]),
        ],
        "body",
        [helper.make_tensor_value_info(name, kind, None) for name in (f"s{mark}", f"x{mark}")],
        [helper.make_tensor_value_info(name, kind, None) for name in (f"s{mark}_out", f"scan{mark}")],
    )
    options = {"scan_output_axes": [g.random.randrange(len(shape) + 1)]} if g.random.random() < 0.5 else {}
    made = g.add("Scan", [start, a], body=body, num_scan_inputs=1, scan_input_axes=[axis], outputs=2, **options)
    return g.random.choice(made)


@maker(2)
def machine_learning(g):
    a = g.pick(least=1, most=3)
    width = g.arrays[a].shape[-1]
    kind = g.random.randrange(7)
    if kind == 0:
        return g.add("Scaler", [a], domain=ML, offset=[float(n) for n in range(width)], scale=[2.0] * width)
    if kind == 1:
        return g.add("Normalizer", [a], domain=ML, norm=g.random.choice(["L1", "L2", "MAX"]))
    if kind == 2:
        return g.add("Imputer", [a], domain=ML, imputed_value_floats=[7.0] * width, replaced_value_float=1.0)
    if kind == 3:
        return g.add(
            "LinearRegressor",
            [a],
            domain=ML,
            coefficients=[float(n) for n in range(2 * width)],
            intercepts=[1.0, 2.0],
            targets=2,
        )
    if kind == 4:
        return g.add(
            "LinearClassifier", [a], domain=ML, coefficients=[float(n - 2) for n in range(3 * width)],
            intercepts=[0.0, 1.0, 0.5], classlabels_ints=[4, 5, 6], post_transform=g.random.choice(["NONE", "SOFTMAX"]), outputs=2,
        )[1]  # fmt: skip
    if kind == 5:
        return g.add(
            "TreeEnsembleRegressor", [a], domain=ML, nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[width - 1, 0, 0],
            nodes_values=[0.5, 0.0, 0.0], nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
            target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[3.0, 5.0], n_targets=1,
        )  # fmt: skip
    return g.add("OneHotEncoder", [g.pick("i")], domain=ML, cats_int64s=[0, 1, 2])


@maker()
def feature_extractor(g):
    if g.random.random() < 0.5:
        return g.add("ArrayFeatureExtractor", [g.floats(3), g.pick("i", least=1)], domain=ML)
    return g.add(
        "ArrayFeatureExtractor",
        [g.pick(least=1), g.random.choice([g.ints(0), g.ints(1, 0), g.pick("i", least=1)])],
        domain=ML,
    )


@maker()
def strings(g):
    s = g.pick("O")
    if g.opset >= 20 and g.random.random() < 0.6:
        return g.add("StringSplit", [s], delimiter=" ", outputs=2)[g.random.randrange(2)]
    return g.add(
        "TfIdfVectorizer", [s], mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0, ngram_counts=[0],
        ngram_indexes=[0, 1], pool_strings=["a", "a b"],
    )  # fmt: skip


@maker()
def fused(g):
    a = g.pick(least=3, most=3)
    width = g.arrays[a].shape[-1]
    kind = g.random.randrange(4)
    if kind == 0:
        return g.add(
            "SkipLayerNormalization", [a, g.pick(least=2, most=3), g.floats(width), g.floats(width)], domain=MICROSOFT
        )
    if kind == 1:
        return g.add("BiasGelu", [a, g.floats(width)], domain=MICROSOFT)
    if kind == 2:
        return g.add("Attention", [a, g.floats(width, 12), g.floats(12)], domain=MICROSOFT, num_heads=2)
    return g.add("MultiHeadAttention", [a, g.pick(least=3, most=3), a], domain=MICROSOFT, num_heads=1)
