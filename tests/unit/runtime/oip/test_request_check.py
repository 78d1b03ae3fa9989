"""A request is compared with what the model declares, in no more steps than the model has tensors."""

from types import SimpleNamespace

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.request_check import MAX_PARAMETERS, check_request, check_shape
from services.runtime.request_limits import MAX_STRINGS

INPUTS = {"x": ("FP32", (-1, 4)), "text": ("BYTES", (-1,))}
OUTPUTS = ("y", "z")


def request(*tensors, outputs=()):
    made = v2.ModelInferRequest()
    for name, datatype, shape in tensors:
        made.inputs.add(name=name, datatype=datatype, shape=shape)
    for name in outputs:
        made.outputs.add(name=name)
    return made


def check(made):
    check_request(made, "m", INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("made", "field", "words"),
    [
        (request(("w", "FP32", [1, 4])), "inputs[0].name", "model 'm' has no input 'w'; it has 'x', 'text'"),
        (request(*[("x", "FP32", [1, 4])] * 2), "inputs[1].name", "input 'x' is given twice"),
        (request(("x", "FP64", [1, 4])), "inputs[0].datatype", "input 'x' has datatype FP64; the model takes FP32"),
        (request(("x", "FP", [1, 4])), "inputs[0].datatype", "there is no 'FP'"),
        (request(("x", "FP32", [4])), "inputs[0].shape", "the model takes [-1, 4]"),
        (request(("x", "FP32", [1, 5])), "inputs[0].shape", "[1, 5]"),
        (
            request(("x", "FP32", [-1, 4])),
            "inputs[0].shape",
            "'x' has shape [-1, 4]; the dimensions of a request are the sizes of its data, 0 or more, as in [1, 4]; "
            "the model takes [-1, 4], where -1",
        ),
        (request(("x", "FP32", [1 << 40, 4])), "inputs[0].shape", "its dimensions may multiply to"),
        (request(("text", "BYTES", [MAX_STRINGS + 1])), "inputs[0].shape", "131072 at most"),
        (request(outputs=["w"]), "outputs[0].name", "model 'm' has no output 'w'; it has 'y', 'z'"),
        (request(outputs=["y", "y"]), "outputs[1].name", "output 'y' is asked for twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(made, field, words):
    with pytest.raises(InvalidArgumentError) as refused:
        check(made)
    assert refused.value.field == field
    assert words in refused.value.message


def test_what_fits_is_let_through():
    check(request(("x", "FP32", [0, 4]), ("text", "BYTES", [MAX_STRINGS]), outputs=["z", "y"]))
    check(request())


@pytest.mark.parametrize("where", ["parameters", "inputs[0].parameters", "outputs[0].parameters"])
def test_parameters_are_bounded(where):
    made = request(("x", "FP32", [1, 4]), outputs=["y"])
    owner = {"p": made, "i": made.inputs[0], "o": made.outputs[0]}[where[0]]
    for number in range(MAX_PARAMETERS):
        owner.parameters[str(number)].bool_param = True
    check(made)
    owner.parameters["one more"].bool_param = True
    with pytest.raises(InvalidArgumentError, match="65 entries; at most 64") as refused:
        check(made)
    assert refused.value.field == where


class Counted:
    """A repeated field that counts how many of its elements are looked at."""

    def __init__(self, elements):
        self._elements = elements
        self.seen = 0

    def __len__(self):
        return len(self._elements)

    def __iter__(self):
        for element in self._elements:
            self.seen += 1
            yield element

    def __getitem__(self, index):
        return self._elements[index]


def test_no_more_dimensions_are_looked_at_than_the_model_has():
    shape = Counted([1] * 100_000)
    with pytest.raises(InvalidArgumentError, match=r"and 99968 dimensions more; the model takes \[-1, 4\]"):
        check_shape(shape, (-1, 4), "x", 0)
    assert shape.seen == 0


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_no_more_tensors_are_looked_at_than_the_model_has_and_one(what):
    made = request(*[("x", "FP32", [1, 4])] * 16_000, outputs=["y"] * 16_000)
    few = SimpleNamespace(parameters={}, inputs=(), outputs=())
    many = Counted(getattr(made, what))
    setattr(few, what, many)
    with pytest.raises(InvalidArgumentError, match="twice"):
        check_request(few, "m", INPUTS, OUTPUTS)
    assert many.seen == 2
