"""The models that are served if no repository is named: magika and a tiny MLP."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from services.cli.commands import magika_features


def fill(models: Path, say: Callable[[str], None]) -> None:
    folder = magika_features.model_folder()
    if folder is None:
        say("warning: magika is not installed, so its model is not served; pip install 'ringmesh-server[demo]'")
    else:
        source = folder / "model.onnx"
        _add(models, "magika", lambda path: shutil.copyfile(source, path))
    _add(models, "mlp", write_mlp)


def write_mlp(path: Path) -> None:
    """Writes an MLP, FP32 x[n,64] -> y[n,10], with fixed weights: so cheap that overhead dominates its latency."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 64), "b1": (64,), "w2": (64, 10), "b2": (10,)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), key) for key, shape in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def _add(models: Path, name: str, write: Callable[[Path], object]) -> None:
    """Adds a missing model atomically, because another stack can fill the same repository at the same time."""
    if (models / name).is_dir():
        return
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models.parent, prefix=f".{name}-") as scratch:
        version = Path(scratch) / name / "1"
        version.mkdir(parents=True)
        write(version / "model.onnx")
        try:
            version.parent.rename(models / name)
        except OSError:
            if not (models / name).is_dir():
                raise
