import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.entry import Entry, pack, unpack


@given(st.binary(max_size=200), st.binary(max_size=2000), st.integers(0, 2**40))
def test_what_was_packed_is_unpacked(key, value, compute_us):
    entry = unpack(key, pack(key, Entry(value, compute_us, 1_700_000_000_000)))
    assert entry is not None
    assert (entry.value, entry.created_at_ms) == (value, 1_700_000_000_000)
    assert entry.compute_us == min(compute_us, 2**32 - 1)


@given(st.binary(max_size=8), st.integers(0, 3000))
def test_what_repeats_itself_is_packed_smaller_and_comes_back_the_same(pattern, times):
    value = pattern * times
    frame = pack(b"key", Entry(value, 1))
    assert unpack(b"key", frame).value == value
    if len(value) >= 1024:
        assert len(frame) < len(value) / 2


def test_what_does_not_compress_is_kept_as_it_is():
    value = random.Random(0).randbytes(10_000)
    assert pack(b"key", Entry(value, 1)).endswith(value)


@pytest.mark.parametrize("value", [b"some value", b"some value" * 1000], ids=["plain", "compressed"])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_noticed(value, data):
    frame = bytearray(pack(b"key", Entry(value, 12)))
    padding = (1, 2, 3)
    position = data.draw(st.integers(0, len(frame) - 1).filter(lambda index: index not in padding))
    frame[position] ^= 1 << data.draw(st.integers(0, 7))
    assert unpack(b"key", bytes(frame)) is None


def test_a_frame_under_another_key_is_refused():
    assert unpack(b"other", pack(b"key", Entry(b"value", 1))) is None


@pytest.mark.parametrize("frame", [b"", b"\x01", b"something that was never a frame, but long enough"])
def test_something_else_is_refused(frame):
    assert unpack(b"key", frame) is None
