"""What the headers of a call mean, and which are refused (RFC 9113 8.2 and 8.3, gRPC's PROTOCOL-HTTP2.md)."""

import base64

import grpc
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.rpc.request_head import ANSWER, failed, headers, read_head, trailers

CALL = [
    (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C"), (b":authority", b"x"),
    (b"te", b"trailers"), (b"content-type", b"application/grpc"),
]  # fmt: skip

NAMES = st.binary(max_size=20) | st.sampled_from([b"k-bin", b"te", b":path"])


def head(*more, without=()):
    fields = [field for field in CALL if field[0] not in without]
    return read_head([*fields, *more], 0)


def decoded(block):
    return [(bytes(name), bytes(value)) for name, value in hpack.Decoder().decode(block, raw=True)]


def test_a_call():
    read = head((b"x-a", b"1"), (b"k-bin", base64.b64encode(b"\0\xff")), (b"grpc-timeout", b"250m"))
    assert (read.path, read.timeout, read.is_malformed, read.is_grpc) == ("/a.B/C", 0.25, False, True)
    assert read.metadata == (("x-a", "1"), ("k-bin", b"\0\xff"))
    assert read.code is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "more",
    [
        [(b"connection", b"close")],
        [(b"transfer-encoding", b"chunked")],
        [(b"te", b"gzip")],
        [(b"X-a", b"1")],
        [(b"", b"1")],
        [(b"x a", b"1")],
        [(b"x-a", b"1\n2")],
        [(b"x-a", b"1\r2")],
        [(b"x-a", b"\0")],
        [(b":path", b"/other")],
        [(b":protocol", b"websocket")],
    ],
)
def test_headers_that_http_2_does_not_allow(more):
    assert head(*more).is_malformed


@pytest.mark.parametrize("name", [b":method", b":scheme", b":path"])
def test_a_request_needs_its_pseudo_headers(name):
    assert head(without=[name]).is_malformed


@pytest.mark.parametrize("first", [(b"x-a", b"1"), (b"te", b"trailers"), (b"grpc-timeout", b"1S")])
def test_pseudo_headers_come_first(first):
    assert read_head([first, *CALL], 0).is_malformed


@pytest.mark.parametrize(
    ("kind", "is_grpc"),
    [
        (b"application/grpc", True), (b"application/grpc+proto", True), (b"application/grpc;x", True),
        (b"application/grpc-web", False), (b"application/json", False), (b"", False),
    ],
)  # fmt: skip
def test_the_content_type_says_whether_it_is_grpc(kind, is_grpc):
    assert head((b"content-type", kind), without=[b"content-type"]).is_grpc == is_grpc


def test_only_post_is_grpc():
    assert not head(without=[b":method"]).is_grpc
    assert not read_head([(b":method", b"GET"), *CALL[1:]], 0).is_grpc


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"5u", 5e-6), (b"99999999n", 0.099999999), (b"0m", 0),
    ],
)  # fmt: skip
def test_a_timeout(text, seconds):
    assert head((b"grpc-timeout", text)).timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"S", b"1", b"1s", b"-1S", b"1.5S", b"123456789S", b"\xb2S", b" 1S", b"1_0S"])
def test_a_timeout_that_is_none_is_refused(text):
    read = head((b"grpc-timeout", text))
    assert read.code is grpc.StatusCode.INTERNAL
    assert "grpc-timeout" in read.message


@pytest.mark.parametrize("encoding", [b"identity", b"gzip"])
def test_an_encoding_that_is_read(encoding):
    assert head((b"grpc-encoding", encoding)).code is grpc.StatusCode.OK


def test_an_encoding_that_is_not_read_is_refused():
    assert head((b"grpc-encoding", b"snappy")).code is grpc.StatusCode.UNIMPLEMENTED


def test_binary_metadata_has_padding_or_not_and_may_be_a_list():
    read = head((b"k-bin", b"AA"), (b"k-bin", b"AA=="), (b"k-bin", b"AA, AQ==,"), (b"e-bin", b""))
    assert read.metadata == (
        ("k-bin", b"\0"), ("k-bin", b"\0"), ("k-bin", b"\0"), ("k-bin", b"\1"), ("k-bin", b""), ("e-bin", b""),
    )  # fmt: skip


@pytest.mark.parametrize("value", [b"A", b"?", b"AA=A", b"\xff\xff"])
def test_binary_metadata_that_is_not_base64_is_refused(value):
    read = head((b"k-bin", value))
    assert read.code is grpc.StatusCode.INTERNAL
    assert "k-bin" in read.message


def test_names_of_grpc_are_no_metadata_but_those_of_traces():
    names = (b"grpc-accept-encoding", b"grpc-previous-rpc-attempts", b"grpc-trace-bin", b"grpc-tags-bin")
    assert [name for name, _ in head(*[(name, b"AA") for name in names]).metadata] == [
        "grpc-trace-bin",
        "grpc-tags-bin",
    ]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.binary(max_size=20) | st.sampled_from([b"k-bin", b"te", b":path"]), st.binary(max_size=30)))
)
def test_any_fields_are_read_or_refused(fields):
    read_head(fields, 0)
    read_head([*CALL, *fields], 0)


@settings(max_examples=40)
@given(st.text(max_size=50), st.sampled_from([code for code in grpc.StatusCode if code.value[0]]))
def test_a_failure_says_its_code_and_message_in_visible_characters(message, code):
    fields = dict(decoded(failed(code, message, (("x-a", "1"),))))
    assert fields[b"grpc-status"] == b"%d" % code.value[0]
    text = fields.get(b"grpc-message", b"")
    assert all(0x20 <= byte < 0x7F for byte in text)
    assert fields[b"x-a"] == b"1"


def test_a_message_of_a_failure_is_percent_encoded():
    fields = dict(decoded(failed(grpc.StatusCode.INTERNAL, "50 % of é\n\ud800", ())))
    assert fields[b"grpc-message"] == b"50 %25 of %C3%A9%0A?"


@settings(max_examples=40)
@given(st.lists(st.tuples(st.just("k-bin"), st.binary(max_size=50)), max_size=5))
def test_metadata_that_is_sent_is_metadata_that_is_read(metadata):
    assert read_head([*CALL, *decoded(trailers(metadata))], 0).metadata == tuple(metadata)


@pytest.mark.parametrize(
    "entry", [("", "x"), ("A", "x"), ("a b", "x"), (":a", "x"), ("a", "x\n"), ("a", "é"), ("a", b"\xff"), ("a", "\x7f")]
)
def test_metadata_that_grpc_does_not_allow_is_not_sent(entry):
    for encoded in (trailers, headers):
        with pytest.raises(ValueError, match="metadata"):
            encoded([entry])


def test_an_answer_has_the_headers_of_grpc():
    assert decoded(ANSWER)[:2] == [(b":status", b"200"), (b"content-type", b"application/grpc")]
    assert headers(()) is ANSWER
