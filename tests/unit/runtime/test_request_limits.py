"""What a request may hold is decided on its bytes, and what is decided is what the parser would find."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from services.runtime import request_limits, wire
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.oip.infer_request import RequestReader, parse_request
from services.runtime.request_limits import (
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_INTEGERS,
    MAX_STRINGS,
    MAX_TYPED_BYTES,
    check_embedded,
    check_list,
    check_request,
    check_size,
)

INPUT, OUTPUT, PARAMETER, RAW = b"\x2a\0", b"\x32\0", b"\x22\0", b"\x3a\0"
# What no scan gets beyond: who reports something else has not come so far.
MALFORMED = b"\x07"


def typed(**contents):
    request = v2.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="INT64", shape=[1])
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return request.SerializeToString()


@pytest.mark.parametrize("field", [INPUT, OUTPUT, PARAMETER, RAW, INPUT + RAW], ids=["2a", "32", "22", "3a", "pairs"])
@pytest.mark.parametrize("read", [RequestReader().read, parse_request, check_request])
def test_fields_are_counted_and_no_more_than_the_most_are_looked_at(field, read):
    few = field * (MAX_FIELDS // (len(field) // 2))
    read(few)
    with pytest.raises(InvalidArgumentError, match="more than 16384 inputs, outputs, parameters"):
        read(few + field + MALFORMED)


def test_strings_are_counted_and_no_more_than_the_most_are_looked_at():
    contents = b"\x42\0" * MAX_STRINGS
    tensor = wire.field(5, contents)
    check_request(wire.field(5, tensor))
    for many in (
        wire.field(5, wire.field(5, contents + b"\x42\0" + MALFORMED)),  # in one
        wire.field(5, tensor + tensor),  # twice in one, which the parser merges
        wire.field(5, tensor) * 2,  # in two inputs
    ):
        with pytest.raises(InvalidArgumentError, match="more than 131072 strings"):
            check_request(many)


def test_other_fields_of_inputs_are_counted_too():
    with pytest.raises(InvalidArgumentError, match="more than 16384 inputs"):
        check_request(wire.field(5, b"\x0a\0" * MAX_STRINGS + wire.field(9, bytes(MAX_HEAD_BYTES)) + MALFORMED))


@pytest.mark.parametrize("number", range(1, 6))
def test_integers_are_counted_however_long_they_are(number):
    def request(integers):
        return wire.field(5, wire.field(5, wire.field(number, integers)))

    check_request(request(b"\x01" * MAX_INTEGERS))
    check_request(request(b"\xff\x01" * MAX_INTEGERS))
    for many in (
        request(b"\x01" * (MAX_INTEGERS + 1)),
        request(b"\xff\x01" * MAX_INTEGERS) + request(b"\x01"),
        request(b"\xff" * (10 * MAX_INTEGERS) + b"\x01"),
    ):
        with pytest.raises(InvalidArgumentError, match="more than 524288 integers"):
            check_request(many)


def test_integers_one_by_one_count_as_strings_do():
    """Packed is how protobuf 3 writes them; the parser takes both."""
    data = wire.field(5, wire.field(5, b"\x18\x01" * (MAX_STRINGS + 1)))
    with pytest.raises(InvalidArgumentError, match="more than 131072"):
        check_request(data)


def test_raw_contents_are_bounded_by_the_size_of_a_message_only():
    check_request(wire.field(7, bytes(MAX_TYPED_BYTES + 1)))


def test_typed_contents_are_bounded_in_bytes():
    def floats(size):
        return wire.field(5, wire.field(5, wire.field(6, bytes(size))))

    check_request(floats(MAX_TYPED_BYTES - 100))
    for much in (floats(MAX_TYPED_BYTES), floats(MAX_TYPED_BYTES - 100) + floats(100)):
        with pytest.raises(InvalidArgumentError, match="take more than 16777216 bytes"):
            check_request(much)


@pytest.mark.parametrize(
    "head",
    [
        wire.field(1, b"m" * MAX_HEAD_BYTES),
        wire.field(4, wire.field(1, b"p" * MAX_HEAD_BYTES)),
        wire.field(5, wire.field(3, b"\x01" * MAX_HEAD_BYTES)),
        wire.field(5, wire.field(5, b"\x42\0") + wire.field(1, b"x" * MAX_HEAD_BYTES)),
        wire.field(6, wire.field(2, b"x" * MAX_HEAD_BYTES)),
        wire.field(9, b"?" * MAX_HEAD_BYTES),
    ],
    ids=["model name", "parameter", "dimensions", "input name", "output parameter", "unknown field"],
)
def test_all_but_data_is_bounded(head):
    with pytest.raises(InvalidArgumentError, match="names, shapes and parameters of the request take"):
        check_request(head)


LENGTHS = st.one_of(st.none(), st.integers(0, 300))


@st.composite
def fields(draw, depth):
    """Well-formed or not: any tag, any wire type, lengths that may lie."""
    out = b""
    for _ in range(draw(st.integers(0, 5))):
        number, kind = draw(st.integers(0, 10)), draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3, 4, 5]))
        tag = wire.varint(number << 3 | kind)
        if draw(st.booleans()):  # longer than needed, which parsers take
            tag = tag[:-1] + bytes((tag[-1] | 0x80, 0))
        if kind == 2:
            payload = draw(fields(depth - 1)) if depth and draw(st.booleans()) else draw(st.binary(max_size=8))
            lie = draw(LENGTHS) if draw(st.integers(0, 9)) == 0 else None
            out += tag + wire.varint(len(payload) if lie is None else lie) + payload
        else:
            out += tag + {0: wire.varint(draw(st.integers(0, 2**64 - 1))), 1: bytes(8), 5: bytes(4)}.get(kind, b"")
    return out


def count(message):
    strings = integers = 0
    for tensor in message.inputs:
        contents = tensor.contents
        strings += len(contents.bytes_contents)
        for name in ("bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents"):
            integers += len(getattr(contents, name))
    return strings, integers


@given(fields(3))
def test_a_request_is_refused_or_means_what_the_parser_says_it_means(data):
    """And whatever is refused below the limits is malformed, or has a group, which no message of ours has."""
    try:
        parsed = v2.ModelInferRequest.FromString(data)
    except DecodeError:
        parsed = None
    try:
        read = RequestReader().read(data)
    except InvalidArgumentError as error:
        refused = error.message
    else:
        refused = ""
    if refused:
        assert refused == f"the {len(data)} bytes received are not a serialized inference.ModelInferRequest"
        assert parsed is None or any(byte & 7 in (3, 4) for byte in data)
        return
    assert parsed is not None
    assert read.request_id == parsed.id
    if read.parts is not None:
        assert read.parts.raws == [*parsed.raw_input_contents]
        parsed.ClearField("id")
        parsed.ClearField("raw_input_contents")
    assert read.head.message == parsed


@given(st.lists(fields(2), max_size=4), st.lists(st.binary(max_size=9), max_size=9), st.lists(st.integers(0, 2**40)))
def test_nothing_with_more_than_the_limits_is_let_through(noise, strings, integers):
    data = b"".join(noise) + typed(bytes_contents=strings, int64_contents=integers)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as limits:
        for name, limit in (("FIELDS", 5), ("HEAD_BYTES", 20), ("STRINGS", 12), ("INTEGERS", 4)):
            limits.setattr(request_limits, f"MAX_{name}", limit)
        try:
            check_request(data)
        except InvalidArgumentError:
            return
    message = v2.ModelInferRequest.FromString(data)
    raws = sum(2 + len(raw) for raw in message.raw_input_contents)
    if len(data) - raws > 20:  # no more than that is parsed without a look at it
        found, decoded = count(message)
        assert found <= 12
        assert decoded <= 4
    assert len(message.inputs) + len(message.outputs) + len(message.raw_input_contents) <= 5


def test_a_request_within_another_message_is_held_to_the_same():
    tag = router_pb2.ExplainRequest.DESCRIPTOR.fields_by_name["request"].number << 3 | 2
    fine = v2.ModelInferRequest(model_name="m", raw_input_contents=[bytes(1 << 20)])
    check_embedded(router_pb2.ExplainRequest(request=fine, tenant="t").SerializeToString(), tag)
    with pytest.raises(InvalidArgumentError, match="more than 16384 inputs"):
        check_embedded(wire.field(2, b"t") + wire.field(1, INPUT * (MAX_FIELDS + 1)), tag)
    with pytest.raises(InvalidArgumentError, match="more than 16384 inputs"):
        check_embedded(wire.field(3, b"") * (MAX_FIELDS + 1), tag)
    with pytest.raises(InvalidArgumentError, match="twice"):
        check_embedded(wire.field(1, b"") * 2, tag)
    with pytest.raises(InvalidArgumentError, match="are not a serialized message"):
        check_embedded(MALFORMED, tag)


def test_items_of_a_list_are_counted():
    check_list(b"\x0a\0" * MAX_FIELDS)
    check_list(MALFORMED)  # the parser says it better
    with pytest.raises(InvalidArgumentError, match="more than 16384 items"):
        check_list(b"\x0a\0" * (MAX_FIELDS + 1) + MALFORMED)


def test_a_request_that_carries_no_data_is_small():
    check_size(bytes(2 << 20))
    with pytest.raises(ResourceExhaustedError, match="2097153 bytes"):
        check_size(bytes((2 << 20) + 1))
