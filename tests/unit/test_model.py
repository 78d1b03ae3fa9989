import ml_dtypes
import numpy as np
import pytest

from services.inference.model import ModelLoadError, OnnxModel
from services.inference.repository import scan
from services.runtime.errors import InvalidArgumentError
from tests import models


def load(folder):
    (files,) = scan(folder.parent.parent)
    return OnnxModel(files, providers=["CPUExecutionProvider"], intra_op_threads=1, max_batch_rows=8)


def test_a_model_tells_its_inputs_outputs_and_provider(tmp_path):
    model = load(models.mlp(tmp_path))
    assert (model.name, model.version, model.provider) == ("mlp", 1, "CPUExecutionProvider")
    assert [(spec.datatype.name, spec.shape) for spec in model.inputs.values()] == [("FP32", (-1, 64))]
    assert (model.batchable, model.max_batch_rows, model.cacheable) == (True, 8, True)


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


def test_strings_that_are_not_utf8_are_refused(tmp_path):
    model = load(models.identity(tmp_path, "bytes"))
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        model.run({"x": np.array([[b"\xff\xfe"]], object)}, ["y"])


@pytest.mark.parametrize("make", [models.random, models.hidden_random])
def test_a_model_that_draws_random_numbers_is_not_cacheable_wherever_it_does(tmp_path, make):
    model = load(make(tmp_path))
    assert not model.cacheable
    assert "Random" in model.cacheable_reason


def test_a_model_whose_rows_depend_on_each_other_is_not_batched(tmp_path):
    model = load(models.mean_over_rows(tmp_path))
    assert (model.batchable, model.max_batch_rows) == (False, 1)
    assert "other rows" in model.batch_reason


def test_a_fixed_first_dimension_is_not_batched(tmp_path):
    assert "first dimension" in load(models.hidden_random(tmp_path)).batch_reason


@pytest.mark.parametrize("damage", [b"", b"not a model", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_named_with_the_cause(tmp_path, damage):
    file = models.mlp(tmp_path) / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(ModelLoadError) as caught:
        load(file.parent)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
