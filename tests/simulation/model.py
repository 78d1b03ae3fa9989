"""The models of a simulated fleet: files, configurations and analyses are real, and runs take virtual time.

ONNX Runtime loads each model once, so that its graph is analysed as in production. A run computes the same in NumPy. A
row is [id, seconds, poison, 0]. `y` is row * a + b, with the weights of the model's variant. `at` is the start time of
the run in microseconds, so each answer carries its age.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from services.inference.execution.loading import load_model
from services.inference.execution.model import OnnxModel
from services.inference.repository.repository import ModelFiles
from tests.simulation.clock import clock
from tests.simulation.loop import PROCESS

COLUMNS = 4
VARIANTS = 3

_NO_ROWS = 'parameters { key: "ringmesh_row_cache" value { string_value: "false" } }'
QUEUE_SECONDS = 0.2
QUEUE_SIZE = 8
FRESH_SECONDS, STALE_SECONDS = 0.5, 0.5


def _flag(name, value="true"):
    return f'parameters {{ key: "ringmesh_{name}" value {{ string_value: "{value}" }} }}'


CONFIGS = {
    "plain": _NO_ROWS,
    "rows": _flag("row_cache"),
    "scoped": _NO_ROWS + _flag("tenant_scope"),
    "hedged": _NO_ROWS + _flag("hedge"),
    "fresh": _NO_ROWS
    + _flag("cache_ttl_seconds", str(FRESH_SECONDS))
    + _flag("cache_stale_seconds", str(STALE_SECONDS)),
    "queued": f"""
        {_NO_ROWS}
        max_batch_size: 4
        dynamic_batching {{ default_queue_policy {{
            default_timeout_microseconds: {int(QUEUE_SECONDS * 1e6)} max_queue_size: {QUEUE_SIZE} }} }}
        response_cache {{ enable: false }}
    """,
    "loop": _NO_ROWS,
    "uncached": _NO_ROWS + "response_cache { enable: false }",
    "always": _NO_ROWS + _flag("shared_tier", "always"),
    "never": _NO_ROWS + _flag("shared_tier", "never"),
}
KINDS = tuple(CONFIGS)
# Models whose graphs have a loop, so that the run time may depend on the input values.
_LOOPS = ("loop", "queued", "hedged")


def weights(kind, variant):
    """Returns (a, b), which are unique for each model and variant."""
    number = KINDS.index(kind) * VARIANTS + variant
    return np.float32(3 + number), np.float32(1000 * (number + 1))


def answer(kind, variant, rows):
    """Returns the model's answer to these rows."""
    a, b = weights(kind, variant)
    return rows * a + b


def _graph(kind, variant):
    def value(name, datatype, *shape):
        return helper.make_tensor_value_info(name, datatype, shape)

    a, b = weights(kind, variant)
    constants = {"a": a, "b": b, "nothing": np.float32(0)}
    initializers = [
        numpy_helper.from_array(np.array(constant, np.float32), name) for name, constant in constants.items()
    ]
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["y"]),
        helper.make_node("Mul", ["x", "nothing"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["at"], to=TensorProto.INT64),
    ]
    if kind in _LOOPS:
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["go_out"]), helper.make_node("Identity", ["m"], ["m_out"])],
            "body",
            [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("m", TensorProto.FLOAT, "n", COLUMNS)],
            [value("go_out", TensorProto.BOOL), value("m_out", TensorProto.FLOAT, "n", COLUMNS)],
        )
        nodes[1] = helper.make_node("Add", ["scaled", "b"], ["sum"])
        nodes += [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["trips"], to=TensorProto.INT64),
            helper.make_node("Loop", ["trips", "", "sum"], ["y"], body=body),
        ]
    x, y = (value(name, TensorProto.FLOAT, "n", COLUMNS) for name in "xy")
    return helper.make_graph(nodes, kind, [x], [y, value("at", TensorProto.INT64, "n", COLUMNS)], initializers)


def _write(repository, kind, variant):
    folder = repository / kind / "1"
    folder.mkdir(parents=True)
    model = helper.make_model(_graph(kind, variant), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    batch = "max_batch_size: 0 " if kind == "loop" else ""
    (folder.parent / "config.pbtxt").write_text(batch + CONFIGS[kind])


_FOLDER = tempfile.TemporaryDirectory(prefix="ringmesh-simulation-")
_REPOSITORIES = [Path(_FOLDER.name) / str(variant) for variant in range(VARIANTS)]
for _variant, _repository in enumerate(_REPOSITORIES):
    for _kind in KINDS:
        _write(_repository, _kind, _variant)


class Repository:
    """A ModelSource: the workers' model repository on disk. A test writes a new model by changing `variants`."""

    private = True

    def __init__(self, kinds):
        self.variants = dict.fromkeys(kinds, 0)

    def names(self):
        return list(self.variants)

    def fingerprint(self):
        return {kind: frozenset({(kind, 0, variant)}) for kind, variant in self.variants.items()}

    def fetch(self, name, override):
        return _REPOSITORIES[self.variants[name]]


class SimModel(OnnxModel):
    """A model on one worker; `runs` is notified of each run and decides how long it takes."""

    def run(self, inputs, outputs):
        rows = inputs["x"]
        at_us = clock.ns() // 1000
        self.runs.ran(self, rows, PROCESS.get())
        clock.within_ns += int(self.runs.seconds(rows) * 1e9)
        a, b = weights(self.name, self.variant)
        made = {"y": rows * a + b, "at": np.full(rows.shape, at_us, np.int64)}
        return [made[name] for name in outputs]


_LOADED = {}


def open_model(files: ModelFiles, runs):
    """Opens a model as a worker does, and connects it to `runs`."""
    variant = int(files.origin.parents[1].name)
    loaded = _LOADED.get((files.name, variant))
    if loaded is None:
        loaded = load_model(files, providers=["CPUExecutionProvider"], intra_op_threads=1, max_batch_rows=16)
        _LOADED[files.name, variant] = loaded
    made = object.__new__(SimModel)
    made.__dict__.update(loaded.__dict__)
    made.runs, made.variant = runs, variant
    return made
