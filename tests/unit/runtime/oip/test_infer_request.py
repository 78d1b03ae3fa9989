"""A request taken apart without a parser says what the parser says, or leaves it to the parser."""

import tracemalloc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import wire
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.infer_request import MAX_HEAD, RequestReader, request_id, take_apart

TENSOR = v2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4]).SerializeToString()
# Fields of the message, in any order and number: the last id wins, and so does the last name.
FIELDS = st.one_of(
    st.tuples(st.sampled_from([1, 2, 3]), st.text(max_size=9).map(str.encode)),
    st.tuples(st.just(7), st.binary(max_size=300)),
    st.tuples(st.just(5), st.just(TENSOR)),
    st.tuples(st.just(9), st.binary(max_size=5)),
    st.tuples(st.just(3), st.just(b"\xff")),
)


def written(fields):
    return b"".join(wire.field(number, payload) for number, payload in fields)


@given(st.lists(FIELDS, max_size=8))
def test_it_says_what_the_parser_says(fields):
    data = written(fields)
    parts = take_apart(data)
    try:
        parsed = v2.ModelInferRequest.FromString(data)
    except DecodeError:
        assert parts is None
        return
    if not parsed.raw_input_contents:
        assert parts is None
        return
    assert request_id(data) == parsed.id
    if parts is None:  # an id that another one replaces
        assert [number for number, _ in fields].count(3) > 1
        return
    assert parts.raws == [*parsed.raw_input_contents]
    assert parts.request_id == parsed.id
    read = RequestReader().read(data)
    head = read.head
    assert read.request_id == parsed.id
    assert (head.name, head.version) == (parsed.model_name, parsed.model_version)
    parsed.ClearField("id")
    parsed.ClearField("raw_input_contents")
    assert head.message == parsed


@given(st.binary(max_size=60), st.lists(FIELDS, max_size=4), st.integers(0, 200))
def test_what_the_parser_refuses_is_left_to_it(noise, fields, cut):
    data = (written(fields) + noise)[: cut or None]
    parts = take_apart(data)
    try:
        v2.ModelInferRequest.FromString(data)
    except DecodeError:
        if parts is not None:
            with pytest.raises(InvalidArgumentError, match=f"the {len(data)} bytes received"):
                RequestReader().read(data)


def test_requests_that_differ_in_data_and_id_have_one_head():
    first, second = [
        take_apart(v2.ModelInferRequest(model_name="m", id=name, raw_input_contents=[data]).SerializeToString())
        for name, data in (("a", b"1"), ("", b"22"))
    ]
    assert first.head == second.head
    assert (first.raws, second.raws) == ([b"1"], [b"22"])


@pytest.mark.parametrize("name", ["m", "m" * MAX_HEAD])
def test_a_head_that_is_not_worth_remembering_is_left_to_the_parser(name):
    data = v2.ModelInferRequest(model_name=name, raw_input_contents=[b"1"]).SerializeToString()
    assert (take_apart(data) is None) == (len(name) == MAX_HEAD)


def test_heads_are_bounded(monkeypatch):
    monkeypatch.setattr("services.runtime.oip.infer_request._MAX_HEADS", 10)
    reader = RequestReader()
    for number in range(35):
        data = v2.ModelInferRequest(model_name=str(number), raw_input_contents=[b""]).SerializeToString()
        assert reader.read(data).head.name == str(number)
    assert len(reader._heads) <= 10


def test_a_head_does_not_hold_on_to_the_data_it_came_with():
    reader = RequestReader()
    tracemalloc.start()
    try:
        for number in range(100):
            data = v2.ModelInferRequest(model_name=str(number), raw_input_contents=[bytes(1 << 20)]).SerializeToString()
            reader.read(data)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reader._heads) == 100
    assert taken < 50 << 20


def test_a_request_of_countless_fields_is_left_to_the_parser():
    assert take_apart(b"\x3a\0" * 200) is not None
    assert take_apart(b"\x3a\0" * 300) is None
