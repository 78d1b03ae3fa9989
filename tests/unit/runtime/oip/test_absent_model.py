"""A model that is not served: the caller gets the right status, and hears of one other model at most."""

import pytest

from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError
from services.runtime.oip.absent_model import absent, nearest

HELD = {"densenet_onnx": ["1", "3"], "mlp": ["1"]}
FAILED = {"bad": {"2": "no file"}, "mlp": {"2": "too large"}, "worse": {"": "its config.pbtxt"}}


@pytest.mark.parametrize(
    ("name", "version", "error", "message"),
    [
        ("bad", "", UnavailableError, "model 'bad' failed to load: no file"),
        ("bad", "2", UnavailableError, "version 2 of model 'bad' failed to load: no file"),
        ("bad", "7", UnavailableError, "model 'bad' failed to load: no file"),
        ("worse", "1", UnavailableError, "model 'worse' failed to load: its config.pbtxt"),
        ("mlp", "2", UnavailableError, "version 2 of model 'mlp' failed to load: too large"),
        ("mlp", "7", NotFoundError, "model 'mlp' has no version '7'; it has: 1"),
        ("densenet_onnx", "0", NotFoundError, "model 'densenet_onnx' has no version '0'; it has: 1, 3"),
        ("densenet-onnx", "", NotFoundError, "'densenet-onnx' is not found; did you mean 'densenet_onnx'?"),
        ("MLP", "", NotFoundError, "'MLP' is not found; did you mean 'mlp'?"),
        ("nobody", "", NotFoundError, "Request for unknown model: 'nobody' is not found; RepositoryIndex lists"),
        *((name, "abc", InvalidArgumentError, "model_version is 'abc'; it is a whole number") for name in ("mlp", "x")),
        ("mlp", "-1", InvalidArgumentError, "model_version is '-1'"),
        ("mlp", "9" * 300, InvalidArgumentError, "model_version is '999"),
    ],
)
def test_a_version_that_is_not_served_is_told_with_its_cause(name, version, error, message):
    found = absent(name, version, HELD, FAILED)
    assert type(found) is error
    assert message in found.message


def test_no_other_model_is_named_unless_its_name_is_almost_the_same():
    message = absent("nobody", "", HELD, FAILED).message
    assert not any(name in message for name in (*HELD, *FAILED))
    assert "mlp" not in absent("mlq", "", HELD, FAILED, suggests=False).message


def test_the_nearest_of_many_names_is_sought_among_few():
    many = [f"model-{number:05}" for number in range(100_000)]
    assert nearest("model-0000", many) in many[:100]
    assert nearest("x" * 300, many) == ""
