import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state

from services.inference.execution import graph
from tests import models
from tests.unit.inference.loaded import load


def dropout(repository, *training_mode):
    inputs = ["x", "ratio", "training_mode"][: 2 + len(training_mode)]
    values = [numpy_helper.from_array(np.array(0.5, np.float32), "ratio")]
    values += [numpy_helper.from_array(np.array(value), "training_mode") for value in training_mode]
    return models.save(
        repository,
        "dropout",
        [helper.make_node("Dropout", inputs, ["y"])],
        [models.value("x", TensorProto.FLOAT, "n", 2)],
        [models.value("y", TensorProto.FLOAT, "n", 2)],
        values,
    )


def test_dropout_that_may_train_is_not_cacheable_and_one_that_cannot_is(tmp_path):
    assert load(dropout(tmp_path / "training", True)).cacheable.reason == "its graph holds Dropout with training_mode"
    assert load(dropout(tmp_path / "inference")).cacheable


def test_every_operator_of_onnxruntime_that_draws_random_numbers_is_known():
    schemas = onnxruntime_pybind11_state.get_all_operator_schema()
    # A hash has a seed, and is the same for the same seed.
    seeded = {one.name for one in schemas if {"seed"} & {*one.attributes, *(i.name for i in one.inputs)}} - {
        "MurmurHash3"
    }
    # Of Dropout, it depends on an input.
    assert seeded - {"Dropout"} == graph.RANDOM_OPERATORS
