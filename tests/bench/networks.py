"""A CNN and a transformer with random weights, by default of a size that keeps a GPU busy."""

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests import models as small
from tests.bench.models import Model

CLASSES = 1000


class _Graph:
    """Nodes and weights as they are added; each method returns the name of a node's output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """Adds a random weight, scaled so that activations keep their magnitude."""
        scale = (2 / np.prod(shape[1:] if len(shape) == 4 else shape[:1])) ** 0.5
        return self.constant((self._rng.standard_normal(shape, np.float32) * scale).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def save(self, repository: Path, model: str, x: object, last: str, outputs: int) -> None:
        self.nodes.append(helper.make_node("Identity", [last], ["y"]))
        y = small.value("y", TensorProto.FLOAT, "n", outputs)
        small.save(repository, model, self.nodes, [x], [y], self.weights)


def cnn(
    side: int = 224, channels: tuple[int, ...] = (64, 128, 256, 512), blocks: tuple[int, ...] = (3, 4, 6, 3)
) -> Model:
    """ResNet-34 by its shapes: an image of bytes [3, side, side] to 1000 classes, 3.6 GFLOP at the defaults."""

    def write(repository: Path) -> None:
        graph = _Graph()
        add = graph.add
        last = add("Mul", add("Cast", "x", to=TensorProto.FLOAT), graph.constant(np.float32(1 / 255)))
        last = add("Relu", add("Conv", last, graph.weight(channels[0], 3, 7, 7), strides=[2, 2], pads=[3] * 4))
        last = add("MaxPool", last, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        before = channels[0]
        for stage, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            for block in range(count):
                step = [2, 2] if stage and not block else [1, 1]
                inner = add("Conv", last, graph.weight(width, before, 3, 3), strides=step, pads=[1] * 4)
                inner = add("Conv", add("Relu", inner), graph.weight(width, width, 3, 3), pads=[1] * 4)
                if width != before or step != [1, 1]:
                    last = add("Conv", last, graph.weight(width, before, 1, 1), strides=step)
                # Halve the sum, because with random weights it would grow from block to block.
                last = add("Relu", add("Mul", add("Add", inner, last), graph.constant(np.float32(0.5))))
                before = width
        last = add("Flatten", add("GlobalAveragePool", last))
        last = add("MatMul", last, graph.weight(before, CLASSES))
        x = small.value("x", TensorProto.UINT8, "n", 3, side, side)
        graph.save(repository, "cnn", x, last, CLASSES)

    return Model("cnn", "UINT8", "x", [3, side, side], "y", [CLASSES], write)


def transformer(layers: int = 6, width: int = 768, tokens: int = 128, heads: int = 12) -> Model:
    """DistilBERT by its shapes: `tokens` ids to one vector of `width`, 11 GFLOP at the defaults."""

    def write(repository: Path) -> None:
        graph = _Graph()
        add, weight = graph.add, graph.weight
        split = graph.constant(np.array([0, tokens, heads, width // heads], np.int64))
        joined = graph.constant(np.array([0, tokens, width], np.int64))
        scale = graph.constant(np.float32((width // heads) ** -0.5))
        ones, zeros = graph.constant(np.ones(width, np.float32)), graph.constant(np.zeros(width, np.float32))

        def normal(name: str) -> str:
            return add("LayerNormalization", name, ones, zeros, axis=-1)

        def heads_of(name: str, *axes: int) -> str:
            return add("Transpose", add("Reshape", add("MatMul", name, weight(width, width)), split), perm=axes)

        last = normal(add("Add", add("Gather", weight(8192, width), "x", axis=0), weight(tokens, width)))
        for _ in range(layers):
            query, key, value = heads_of(last, 0, 2, 1, 3), heads_of(last, 0, 2, 3, 1), heads_of(last, 0, 2, 1, 3)
            share = add("Softmax", add("Mul", add("MatMul", query, key), scale), axis=-1)
            mixed = add("Reshape", add("Transpose", add("MatMul", share, value), perm=[0, 2, 1, 3]), joined)
            last = normal(add("Add", last, add("MatMul", mixed, weight(width, width))))
            wide = add("Relu", add("MatMul", last, weight(width, 4 * width)))
            last = normal(add("Add", last, add("MatMul", wide, weight(4 * width, width))))
        last = add("ReduceMean", last, axes=[1], keepdims=0)
        graph.save(repository, "transformer", small.value("x", TensorProto.INT32, "n", tokens), last, width)

    return Model("transformer", "INT32", "x", [tokens], "y", [width], write)
