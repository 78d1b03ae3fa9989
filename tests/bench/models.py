"""The models of the benchmarks; each shows one aspect of performance."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from services.cli.commands import demo_models, magika_features
from tests import models as small

# Length of an input row of the models of `write_layers`.
FEATURES = 256


@dataclass(frozen=True)
class Model:
    """A model with one input and one output. Dims are those of a row; -1 means any size."""

    name: str
    datatype: str
    input: str
    input_dims: Sequence[int]
    output: str
    output_dims: Sequence[int]
    write: Callable[[Path], object]

    def row(self, rng: np.random.Generator, width: int = 1) -> np.ndarray:
        """Returns a request of one row; `width` replaces free dimensions."""
        shape = (1, *(width if dim < 0 else dim for dim in self.input_dims))
        if integers := {"INT32": np.int32, "UINT8": np.uint8}.get(self.datatype):
            return rng.integers(0, 256, shape, dtype=integers)
        return rng.random(shape, dtype=np.float32)


# Used for Ringmesh and Triton alike.
CONFIG = """
max_batch_size: 64
instance_group { count: 2 kind: KIND_CPU }
dynamic_batching { }
response_cache { enable: true }
"""


def write(model: Model, repository: Path, config: str = CONFIG) -> None:
    """Writes `<repository>/<name>/1/model.onnx` and `config.pbtxt`."""
    (repository / model.name / "1").mkdir(parents=True)
    model.write(repository)
    (repository / model.name / "config.pbtxt").write_text(config)


def _mlp(repository: Path) -> None:
    demo_models.write_mlp(repository / "mlp" / "1" / "model.onnx")


def _magika(repository: Path) -> None:
    folder = magika_features.model_folder()
    assert folder is not None, "the bench needs magika: pip install 'ringmesh-server[demo]'"
    shutil.copyfile(folder / "model.onnx", repository / "magika" / "1" / "model.onnx")


def _dense(repository: Path) -> None:
    write_layers(repository, "dense", 1024)


def write_layers(repository: Path, name: str, width: int) -> Path:
    """Writes a model of four layers, two of them [width, width], from rows of FEATURES to rows of 16.

    Returns its file.
    """
    rng = np.random.default_rng(0)
    shapes = {"w1": (FEATURES, width), "w2": (width, width), "w3": (width, width), "w4": (width, 16)}
    weights = [
        numpy_helper.from_array((rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32), weight)
        for weight, shape in shapes.items()
    ]
    nodes, last = [], "x"
    for weight in ("w1", "w2", "w3"):
        nodes.append(helper.make_node("MatMul", [last, weight], [f"{weight}_product"]))
        nodes.append(helper.make_node("Relu", [f"{weight}_product"], [f"{weight}_out"]))
        last = f"{weight}_out"
    nodes.append(helper.make_node("MatMul", [last, "w4"], ["y"]))
    x, y = small.value("x", TensorProto.FLOAT, "n", FEATURES), small.value("y", TensorProto.FLOAT, "n", 16)
    return small.save(repository, name, nodes, [x], [y], weights) / "model.onnx"


def _image(name: str, side: int) -> Model:
    def write(repository: Path) -> None:
        node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
        x, y = small.value("x", TensorProto.FLOAT, "n", 3, side, side), small.value("y", TensorProto.FLOAT, "n", 3)
        small.save(repository, name, [node], [x], [y])

    return Model(name, "FP32", "x", [3, side, side], "y", [3], write)


def _identity(repository: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (small.value(name, TensorProto.FLOAT, "n", "m") for name in "xy")
    small.save(repository, "identity", [node], [x], [y])


# So cheap that the request path dominates.
MLP = Model("mlp", "FP32", "x", [64], "y", [10], _mlp)
# 9 MB of weights, read once a batch: a batch of 16 takes little more than one row.
DENSE = Model("dense", "FP32", "x", [256], "y", [16], _dense)
# A real model: 6 ms of a core a row, and no gain from batches on a CPU. Requests are 8 KB, answers 0.9 KB.
MAGIKA = Model("magika", "INT32", "bytes", [2048], "target_label", [214], _magika)
# 600 KB and 300 KB in, 12 bytes out.
IMAGE = _image("image", 224)
SMALL_IMAGE = _image("small-image", 160)
# The output is as large as the input.
IDENTITY = Model("identity", "FP32", "x", [-1], "y", [-1], _identity)
