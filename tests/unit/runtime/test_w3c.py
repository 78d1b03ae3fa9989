import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime import w3c

ID, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_traceparent_is_read_and_written():
    assert w3c.parse_traceparent(f"00-{ID}-{SPAN}-01") == (ID, SPAN, True)
    assert w3c.parse_traceparent(f"00-{ID}-{SPAN}-02") == (ID, SPAN, False)
    assert w3c.traceparent(ID, SPAN, False) == f"00-{ID}-{SPAN}-00"


@pytest.mark.parametrize("bits", [0, 1, -1])
def test_new_ids_are_valid_whatever_the_generator_gives(monkeypatch, bits):
    monkeypatch.setattr(w3c.random, "getrandbits", lambda size: bits % (1 << size))
    ids = w3c.new_trace_id(), w3c.new_span_id()
    assert w3c.parse_traceparent(w3c.traceparent(*ids, sampled=True)) == (*ids, True)


def test_a_later_version_may_have_more_behind_it():
    assert w3c.parse_traceparent(f"01-{ID}-{SPAN}-01-more") == (ID, SPAN, True)


@pytest.mark.parametrize(
    "value",
    [
        f"ff-{ID}-{SPAN}-01",
        f"00-{ID}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{ID}-{'0' * 16}-01",
        f"00-{ID.upper()}-{SPAN}-01",
    ],
)
def test_what_is_not_a_traceparent_is_none(value):
    assert w3c.parse_traceparent(value) is None


@given(st.text())
def test_no_text_breaks_the_parsers(text):
    w3c.parse_traceparent(text)
    w3c.parse_baggage(text)


def test_baggage_is_decoded_and_bounded():
    assert w3c.parse_baggage("a=1;p=x, b = two%20words ,bad,=x,c=") == {"a": "1", "b": "two words", "c": ""}
    assert len(w3c.parse_baggage(",".join(f"k{n}=1" for n in range(200)))) == 64
    assert w3c.parse_baggage("a=" + "x" * 9000) == {}


def test_a_long_tracestate_is_left_out():
    assert w3c.usable_state("a=b") == "a=b"
    assert w3c.usable_state("a" * 513) == ""


@given(st.text(max_size=60))
def test_packed_ids_have_24_bytes_or_none(text):
    assert len(w3c.packed(text)) in (0, 24)


@pytest.mark.parametrize("value", ["00-ab", "", f"00-{ID}", f"00-{' ' * 32}-{SPAN}"])
def test_part_of_a_traceparent_is_not_packed(value):
    assert w3c.packed(value) == b""
