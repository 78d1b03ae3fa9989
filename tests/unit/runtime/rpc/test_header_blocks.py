"""HPACK as RFC 7541 has it: what the library `hpack` encodes is decoded, and it decodes what is encoded here."""

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.rpc.header_blocks import TABLE_BYTES, HeaderDecoder, HeaderError, encode_field

LIMIT = 64 << 10
HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
# Few names and values, so that the table is used, and any others.
NAMES = st.sampled_from([b":path", b":method", b"content-type", b"x-a", b"x-b"]) | st.binary(max_size=40)
VALUES = st.sampled_from([b"POST", b"/a/b", b"", b"v" * 1500]) | st.binary(max_size=40)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=12)
# Fields, whether they are compressed with Huffman's code, and the size of the table from here on; None: as before.
BLOCKS = st.lists(st.tuples(FIELDS, st.booleans(), st.none() | st.integers(0, TABLE_BYTES)), max_size=12)


def string(text):
    """A string whose length needs one byte."""
    return bytes([len(text)]) + text


@settings(max_examples=40)
@given(BLOCKS)
def test_blocks_of_one_connection_mean_the_fields_that_were_encoded(blocks):
    encoder, decoder = hpack.Encoder(), HeaderDecoder(LIMIT)
    for fields, is_huffman, table_bytes in blocks:
        if table_bytes is not None:
            encoder.header_table_size = table_bytes
        block = encoder.encode(fields, huffman=is_huffman)
        assert decoder.decode(block) == fields
        assert decoder.size == sum(len(name) + len(value) + 32 for name, value in fields)


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_fields_or_an_error_as_in_the_library(blocks):
    decoder, library = HeaderDecoder(LIMIT), hpack.Decoder(LIMIT)
    for block in blocks:
        try:
            expected = [(bytes(name), bytes(value)) for name, value in library.decode(block, raw=True)]
        except hpack.HPACKError:
            expected = None
        try:
            fields = decoder.decode(block)
        except HeaderError:
            assert expected is None
            return
        if expected is None:
            return
        assert fields == expected


@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=5))
def test_an_encoded_field_is_read_by_the_library(fields):
    block = b"".join(encode_field(name, value) for name, value in fields)
    assert [(bytes(name), bytes(value)) for name, value in hpack.Decoder().decode(block, raw=True)] == fields
    assert HeaderDecoder(LIMIT).decode(block) == fields


@pytest.mark.parametrize("size", [126, 127, 128, 254, 255, 256, 16_383, 20_000])
def test_long_values_are_read_by_the_library(size):
    block = encode_field(b"x", b"v" * size)
    assert hpack.Decoder().decode(block, raw=True) == [(b"x", b"v" * size)]


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # the entry 0
        b"\xbe",  # the entry 62 of an empty table
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an index of more than 64 bits
        b"\x7f\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00",  # a name whose number does not end
        b"\xff",  # a number that is cut off
        b"\x40",  # no name
        b"\x40\x01",  # a name that is cut off
        b"\x40\x01x",  # no value
        b"\x40\x01x\x05abc",  # a value that is cut off
        b"\x40\x01x\x7f\xff\xff\xff\xff\x0f",  # a value of 4 GiB
        b"\x40\x01x\x81\x00",  # Huffman's code with padding of zeros
        b"\x40\x01x\x84\xff\xff\xff\xff",  # with the symbol that ends it
        b"\x3f\xe2\x1f",  # a table of 4,097 bytes
        b"\x82\x20",  # a new size of the table after a field
    ],
)
def test_a_block_that_is_not_valid_is_an_error(block):
    with pytest.raises(HeaderError):
        HeaderDecoder(LIMIT).decode(block)


def test_a_new_size_after_a_field_is_an_error_even_if_that_field_is_over_the_limit():
    with pytest.raises(HeaderError):
        HeaderDecoder(40).decode(encode_field(b"x", b"v" * 100) + b"\x20")


def test_of_a_block_over_the_limit_the_first_fields_are_kept_and_all_are_counted():
    decoder = HeaderDecoder(100)
    assert decoder.decode(b"".join(encode_field(b"x", b"%d" % n) for n in range(10))) == [
        (b"x", b"0"), (b"x", b"1")
    ]  # fmt: skip
    assert decoder.size == 340


def test_a_field_over_the_limit_enters_the_table_as_it_is():
    """A small limit must not make the table other than the client's, or later blocks mean something else."""
    value = b"\xfe" * 90  # 28 bits each in Huffman's code
    compressed = HUFFMAN.encode(value)
    decoder = HeaderDecoder(200)
    assert len(compressed) > 200
    decoder.decode(b"\x40" + string(b"x") + b"\xff" + bytes([(len(compressed) - 127) % 128 + 128, 1]) + compressed)
    assert decoder.decode(b"\xbe") == [(b"x", value)]


def test_the_table_is_as_small_as_the_client_says():
    decoder = HeaderDecoder(LIMIT)
    decoder.decode(b"\x40" + string(b"a") + string(b"1") + b"\x40" + string(b"b") + string(b"2"))
    assert decoder.decode(b"\x3f\x03\xbe") == [(b"b", b"2")]  # 34 bytes: one entry
    with pytest.raises(HeaderError):
        decoder.decode(b"\xbf")


def test_changes_of_the_table_are_counted():
    decoder = HeaderDecoder(LIMIT)
    before = decoder.changes
    decoder.decode(encode_field(b"a", b"1") + b"\x82")
    assert decoder.changes == before
    decoder.decode(b"\x40" + string(b"a") + string(b"1"))
    grown = decoder.changes
    assert grown > before
    decoder.decode(b"\x20")
    assert decoder.changes > grown
