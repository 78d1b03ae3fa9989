import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys import RequestHasher, UncacheableError

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
