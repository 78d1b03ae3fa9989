"""Requests that come together are answered as each would be alone: models whose rows a probe cannot tell apart."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from services.inference.codec.request import Decoded
from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.repository.config import ROW_CACHE
from services.inference.scheduling.batcher import Batcher
from tests import models
from tests.unit.inference.loaded import load

EXECUTOR = ThreadPoolExecutor(2)
X, Y = (models.value(name, TensorProto.FLOAT, "n", 1) for name in "xy")


def by_sign_of_the_sum(repository):
    """If(ReduceSum(X) > 0) X + X else -X."""
    branches = [
        helper.make_graph([helper.make_node(operator, inputs, [name])], name, [], [onnx.ValueInfoProto(name=name)])
        for operator, inputs, name in (("Add", ["x", "x"], "sum"), ("Neg", ["x"], "negated"))
    ]
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["condition"]),
        helper.make_node("If", ["condition"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    rows = [np.array([[value]], np.float32) for value in (1, -3, 5, -1)]
    return models.save(repository, "by_sign", nodes, [X], [Y], [zero]), rows


def share_of_the_largest(repository, x="x", width=1, before=(), initializers=()):
    """X / max(ReduceMax(X), 10)."""
    nodes = [
        *before,
        helper.make_node("ReduceMax", [x], ["most"], keepdims=0),
        helper.make_node("Max", ["most", "ten"], ["divisor"]),
        helper.make_node("Div", [x, "divisor"], ["y"]),
    ]
    ten = numpy_helper.from_array(np.array(10, np.float32), "ten")
    x, y = (models.value(name, TensorProto.FLOAT, "n", width) for name in "xy")
    return models.save(repository, "share", nodes, [x], [y], [ten, *initializers])


def rows_of_the_share(repository):
    return share_of_the_largest(repository), [np.array([[value]], np.float32) for value in (1, 1e6, 2, 3)]


def split_words(repository):
    """StringSplit of [n]."""
    node = helper.make_node("StringSplit", ["x"], ["y", "counts"], delimiter=" ")
    x, y = models.value("x", TensorProto.STRING, "n"), models.value("y", TensorProto.STRING, "n", "words")
    folder = models.save(repository, "split", [node], [x], [y])
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 20
    onnx.save(model, folder / "model.onnx")
    return folder, [np.array([text], object) for text in (b"a", b"b c d", b"e f", b"g")]


def quantised(repository):
    """What quantize_dynamic makes of one layer."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.normal(size=(256, 10)).astype(np.float32), "w")
    x, y = models.value("x", TensorProto.FLOAT, "n", 256), models.value("y", TensorProto.FLOAT, "n", 10)
    folder = models.save(repository, "layer", [helper.make_node("MatMul", ["x", "w"], ["y"])], [x], [y], [weights])
    quantize_dynamic(folder / "model.onnx", folder / "small.onnx", weight_type=QuantType.QInt8)
    (folder / "small.onnx").rename(folder / "model.onnx")
    return folder, [(rng.normal(size=(1, 256)) * scale).astype(np.float32) for scale in (1, 1000, 0.1, 10)]


@pytest.mark.parametrize("make", [by_sign_of_the_sum, rows_of_the_share, split_words, quantised])
async def test_requests_that_come_together_are_answered_as_they_are_alone(tmp_path, make):
    folder, rows = make(tmp_path)
    model = load(folder, max_batch_rows=64)
    alone = [model.run({"x": row}, ["y"])[0] for row in rows]
    batcher = Batcher(model, EXECUTOR)
    requests = [Decoded({"x": row}, 1, ("y",), {}, {}, row.shape[1:]) for row in rows]
    for _ in range(5):
        results = await asyncio.gather(*(batcher.submit(request, None) for request in requests))
        for result, expected in zip(results, alone, strict=True):
            (answer,) = result.arrays
            assert answer.shape == expected.shape
            assert answer.tolist() == expected.tolist()
    assert "not proven independent" in model.batchable.reason


async def test_requests_to_a_proven_model_share_runs(tmp_path):
    model = load(models.mlp(tmp_path), max_batch_rows=64)
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(1, 64)) * 10.0**power).astype(np.float32) for power in range(-3, 4)]
    batcher = Batcher(model, EXECUTOR)
    requests = [Decoded({"x": row}, 1, ("y",), {}, {}, (64,)) for row in rows]
    results = await asyncio.gather(*(batcher.submit(request, None) for request in requests))
    assert max(result.batch_requests for result in results) > 1
    for result, row in zip(results, rows, strict=True):
        np.testing.assert_allclose(
            result.arrays[0], model.run({"x": row}, ["y"])[0], rtol=1e-5, atol=1e-5 * abs(row).max()
        )


def products(count, width):
    """MatMul after MatMul by the identity: x, but slowly."""
    names = ["x", *(f"t{turn}" for turn in range(count))]
    nodes = [helper.make_node("MatMul", [names[turn], "w"], [names[turn + 1]]) for turn in range(count)]
    return names[-1], nodes, [numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")]


def test_rows_are_not_cached_where_they_are_not_proven_independent_however_slow(tmp_path):
    last, nodes, initializers = products(60, 512)
    model = load(share_of_the_largest(tmp_path, last, 512, nodes, initializers), max_batch_rows=64)
    assert not model.row_cache
    assert "(ReduceMax): it reduces axis 0" in model.row_cache.reason


def test_a_row_cache_that_is_asked_for_needs_the_proof(tmp_path):
    folder = share_of_the_largest(tmp_path)
    config = f'max_batch_size: 8 parameters {{ key: "{ROW_CACHE}" value {{ string_value: "true" }} }}'
    (folder.parent / "config.pbtxt").write_text(config)
    with pytest.raises(ModelLoadError, match=r"ringmesh_row_cache is true .* not proven independent: node 'most'"):
        load(folder, max_batch_rows=64)


def test_a_row_cache_that_is_asked_for_needs_the_same_bits_in_every_batch(tmp_path, monkeypatch):
    run = OnnxModel.compute

    def other_bits_in_a_batch(model, inputs, outputs):
        arrays = run(model, inputs, outputs)
        return [np.nextafter(array, np.float32(np.inf)) if len(array) > 4 else array for array in arrays]

    folder = models.row_cached(tmp_path)
    assert load(folder).row_cache
    monkeypatch.setattr(OnnxModel, "compute", other_bits_in_a_batch)
    model = load(folder, max_batch_rows=64)
    assert not model.row_cache
    told = model.config().parameters["ringmesh_row_cache"].string_value
    assert told == "no: the last bits of 'y' depend on the size of a batch"


def test_the_owners_word_is_taken_for_batches_and_the_verdict_is_told(tmp_path):
    folder = share_of_the_largest(tmp_path)
    (folder.parent / "config.pbtxt").write_text("max_batch_size: 8 dynamic_batching { }")
    model = load(folder, max_batch_rows=64)
    assert model.batchable
    assert model.batch_remark.startswith(
        "batched because its config.pbtxt says so: rows are not proven independent: node"
    )
    parameters = model.config().parameters
    assert parameters["ringmesh_batched"].string_value == "yes"
    assert parameters["ringmesh_rows_proven_independent"].string_value.startswith("no: node 'most' (ReduceMax)")
