import struct
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.keys import RequestHasher, UncacheableError

HASHER = RequestHasher("secret")


def request(values=(1.0, 2.0), *, shape=(1, 2), datatype="FP32", name="x", typed=False, **fields):
    made = v2.ModelInferRequest(model_name="m", **fields)
    tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
    if typed:
        tensor.contents.fp32_contents.extend(values)
    else:
        made.raw_input_contents.append(struct.pack(f"<{len(values)}f", *values))
    return made


def parameter(**choice):
    return v2.InferParameter(**choice)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_typed_and_raw_contents_of_equal_value_are_one_key(values):
    shape = (1, len(values))
    assert HASHER.hash(request(values, shape=shape)) == HASHER.hash(request(values, shape=shape, typed=True))


@pytest.mark.parametrize(
    "change",
    [
        {"values": (1.0, 3.0)},
        {"shape": (2, 1)},
        {"shape": (1, 2, 1)},
        {"datatype": "INT32"},
        {"name": "y"},
        {"parameters": {"temperature": v2.InferParameter(double_param=0.5)}},
        {"outputs": [v2.ModelInferRequest.InferRequestedOutputTensor(name="y")]},
    ],
    ids=str,
)
def test_whatever_can_change_the_answer_changes_the_key(change):
    assert HASHER.hash(request(**change)) != HASHER.hash(request())


@pytest.mark.parametrize(
    "change",
    [
        {"id": "42"},
        {"parameters": {"priority": v2.InferParameter(uint64_param=1)}},
        {"parameters": {"timeout": v2.InferParameter(int64_param=5)}},
        {"parameters": {"triton_enable_empty_final_response": v2.InferParameter(bool_param=True)}},
        {"parameters": {"sequence_id": v2.InferParameter(int64_param=0)}},
    ],
    ids=str,
)
def test_what_cannot_change_the_answer_is_not_in_the_key(change):
    assert HASHER.hash(request(**change)) == HASHER.hash(request())


def two_inputs(first, second):
    made = v2.ModelInferRequest(model_name="m")
    for name, value in (first, second):
        made.inputs.add(name=name, datatype="FP32", shape=[1])
        made.raw_input_contents.append(struct.pack("<f", value))
    return made


def test_the_order_of_inputs_is_not_in_the_key():
    assert HASHER.hash(two_inputs(("a", 1), ("b", 2))) == HASHER.hash(two_inputs(("b", 2), ("a", 1)))


def test_values_swapped_between_inputs_change_the_key():
    assert HASHER.hash(two_inputs(("a", 1), ("b", 2))) != HASHER.hash(two_inputs(("a", 2), ("b", 1)))


def test_the_order_of_requested_outputs_is_not_in_the_key():
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    forth = request(outputs=[output(name="a"), output(name="b")])
    back = request(outputs=[output(name="b"), output(name="a")])
    assert HASHER.hash(forth) == HASHER.hash(back)


def test_a_parameter_of_a_requested_output_is_in_the_key():
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    plain = request(outputs=[output(name="a")])
    top = request(outputs=[output(name="a", parameters={"classification": parameter(int64_param=3)})])
    assert HASHER.hash(plain) != HASHER.hash(top)


def test_unknown_fields_are_not_in_the_key():
    known = request()
    unknown = v2.ModelInferRequest.FromString(known.SerializeToString() + b"\xa2\x06\x03abc")  # field 100
    assert HASHER.hash(unknown) == HASHER.hash(known)


def test_equal_parameters_of_other_types_are_other_keys():
    integer = request(parameters={"k": parameter(int64_param=1)})
    truth = request(parameters={"k": parameter(bool_param=True)})
    assert HASHER.hash(integer) != HASHER.hash(truth)


def test_fleets_with_other_secrets_have_other_keys():
    assert RequestHasher("other").hash(request()) != HASHER.hash(request())


@pytest.mark.parametrize("choice", [{"int64_param": 7}, {"string_param": "s"}, {"uint64_param": 7}], ids=str)
def test_a_sequence_is_never_cached(choice):
    with pytest.raises(UncacheableError, match="sequence"):
        HASHER.hash(request(parameters={"sequence_id": parameter(**choice)}))


def test_a_tensor_in_shared_memory_is_never_cached():
    made = request()
    made.inputs[0].parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(UncacheableError, match="shared memory"):
        HASHER.hash(made)


def test_raw_and_typed_contents_together_are_left_to_the_worker():
    made = request()
    made.inputs[0].contents.fp32_contents.append(1)
    with pytest.raises(UncacheableError, match="together"):
        HASHER.hash(made)


def test_empty_contents_beside_raw_ones_change_nothing_about_the_key():
    made = request()
    made.inputs[0].contents.SetInParent()
    assert HASHER.hash(made) == HASHER.hash(request())


MODEL_OUTPUTS = ("y", "z")


@dataclass(frozen=True)
class Logical:
    """What a request asks, however it is written down: the same question, the same Logical."""

    inputs: tuple  # of (name, datatype, shape, values, parameters), each name once
    outputs: frozenset
    parameters: frozenset
    tenant: str | None


PARAMETERS = st.frozensets(
    st.tuples(st.sampled_from(["k", "kk", "k=1,1:k"]), st.sampled_from([1, 2, 1.0, True, "1", ""])),
    max_size=2,
).filter(lambda parameters: len({name for name, _ in parameters}) == len(parameters))


@st.composite
def tensors(draw):
    datatype = draw(st.sampled_from(["FP32", "INT32", "UINT32", "INT8", "BYTES"]))
    values = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    shape = draw(st.sampled_from([(len(values),), (1, len(values)), (len(values), 1)]))
    return draw(st.sampled_from(["a", "b", "ab", "1:a"])), datatype, shape, tuple(values), draw(PARAMETERS)


LOGICAL = st.builds(
    Logical,
    inputs=st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda tensor: tensor[0]).map(
        lambda tensors: tuple(sorted(tensors, key=lambda tensor: tensor[0]))
    ),
    outputs=st.frozensets(st.sampled_from(MODEL_OUTPUTS)).map(
        lambda names: frozenset() if names == frozenset(MODEL_OUTPUTS) else names
    ),
    parameters=PARAMETERS,
    tenant=st.sampled_from([None, "", "t", "u"]),
)
CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents", "INT8": "int_contents", "UINT32": "uint_contents"}
DTYPES = {"FP32": np.float32, "INT32": np.int32, "INT8": np.int8, "UINT32": np.uint32}
RESERVED = {
    "priority": parameter(uint64_param=3),
    "timeout": parameter(int64_param=9),
    "triton_enable_empty_final_response": parameter(bool_param=True),
    "sequence_id": parameter(int64_param=0),
    "headers": parameter(string_param="anything"),
}


def fill(message_parameters, wanted):
    for name, value in wanted:
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(message_parameters[name], kind, value)


def written(logical, data):
    """The request as one of the many clients would write it down."""
    made = v2.ModelInferRequest(model_name="m", id=data.draw(st.sampled_from(["", "1", "2"])))
    typed = data.draw(st.booleans())
    for name, datatype, shape, values, parameters in data.draw(st.permutations(logical.inputs)):
        tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
        fill(tensor.parameters, parameters)
        texts = [b"%d" % value for value in values]
        if typed and datatype == "BYTES":
            tensor.contents.bytes_contents.extend(texts)
        elif typed:
            getattr(tensor.contents, CONTENTS[datatype]).extend(values)
        elif datatype == "BYTES":
            made.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
        else:
            made.raw_input_contents.append(np.array(values, DTYPES[datatype]).tobytes())
    names = logical.outputs or data.draw(st.sampled_from([(), MODEL_OUTPUTS]))
    for name in data.draw(st.permutations(sorted(names))):
        made.outputs.add(name=name)
    fill(made.parameters, logical.parameters)
    for name in data.draw(st.sets(st.sampled_from(sorted(RESERVED)))):
        made.parameters[name].CopyFrom(RESERVED[name])
    # Fields in any order on the wire, with some that nobody knows; a field's own elements keep theirs.
    parts = [b"\xa2\x06\x03abc"] if data.draw(st.booleans()) else []
    for field, _ in made.ListFields():
        part = v2.ModelInferRequest()
        part.MergeFrom(made)
        for other, _ in made.ListFields():
            if other.name != field.name:
                part.ClearField(other.name)
        parts.append(part.SerializeToString())
    return v2.ModelInferRequest.FromString(b"".join(data.draw(st.permutations(parts))))


def key_of(logical, data):
    return HASHER.hash(written(logical, data), outputs=MODEL_OUTPUTS, tenant=logical.tenant)


@given(LOGICAL, st.data())
def test_one_question_is_one_key_however_it_is_written(logical, data):
    assert key_of(logical, data) == key_of(logical, data)


@st.composite
def neighbours(draw):
    """Two questions that differ in one part, or in none."""
    one, other = draw(LOGICAL), draw(LOGICAL)
    part = draw(st.sampled_from(["inputs", "outputs", "parameters", "tenant"]))
    return one, replace(one, **{part: getattr(other, part)})


def exact(logical):
    """1, 1.0 and True are equal in Python and different on the wire."""
    return repr([(*tensor[:4], sorted(map(repr, tensor[4]))) for tensor in logical.inputs]), repr(
        (sorted(logical.outputs), sorted(map(repr, logical.parameters)), logical.tenant)
    )


@given(neighbours(), st.data())
def test_two_questions_are_two_keys(pair, data):
    one, other = pair
    assert (key_of(one, data) == key_of(other, data)) == (exact(one) == exact(other))


def test_naming_all_outputs_is_naming_none_only_while_they_are_all():
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    none, both = request(), request(outputs=[output(name="z"), output(name="y")])
    hashes = [HASHER.hash(made, outputs=("y", "z")) for made in (none, both)]
    assert hashes[0] == hashes[1]
    none, both = request(), request(outputs=[output(name="z"), output(name="y")])
    hashes = [HASHER.hash(made, outputs=("y", "z", "more")) for made in (none, both)]
    assert hashes[0] != hashes[1]


def test_large_descriptions_are_not_remembered():
    hasher = RequestHasher("secret")
    for size in range(100):
        hasher.hash(request(parameters={"k": parameter(string_param="x" * (10_000 + size))}))
    assert not len(hasher.described)


def test_a_request_with_other_than_one_raw_content_an_input_is_not_keyed_whatever_came_before():
    hasher = RequestHasher("secret")
    hasher.hash(request())
    made = request()
    made.raw_input_contents.append(b"more")
    with pytest.raises(UncacheableError, match="does not match"):
        hasher.hash(made)


def test_hashing_reads_each_input_once_however_many_there_are(monkeypatch):
    """The sizes were once copied for each input again."""
    read = []

    class Counting:
        def __init__(self, data, key):
            read.append(len(data))

        def update(self, data):
            read.append(len(data))
            return self

        def digest(self, size):
            return bytes(size)

    monkeypatch.setattr("cache.keys.keys.blake3", Counting)
    many = v2.ModelInferRequest(raw_input_contents=[b"four"] * 1000)
    for number in range(1000):
        many.inputs.add(name=f"{number:04}", datatype="BYTES", shape=[0])
    HASHER.hash(many)
    assert len(read) == 1001
    assert read[:1000] == [4] * 1000
    assert read[1000] < 1000 * (8 + 32)
