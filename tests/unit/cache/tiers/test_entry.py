import random
import struct

import lz4.block
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from cache.tiers.entry import _CONTEXT, _FRAME, Entry, EntryFrames, is_answer

FRAMES = EntryFrames("secret")
KEYS = st.binary(max_size=200)


@given(KEYS, st.binary(max_size=2000), st.integers(0, 2**40))
def test_what_was_packed_is_unpacked(key, value, compute_us):
    entry = FRAMES.unpack(key, FRAMES.pack(key, Entry(value, compute_us, 1_700_000_000_000)))
    assert entry is not None
    assert (entry.value, entry.created_at_ms) == (value, 1_700_000_000_000)
    assert entry.compute_us == min(compute_us, 2**32 - 1)


@given(st.binary(max_size=8), st.integers(0, 3000))
def test_what_repeats_itself_is_packed_smaller_and_comes_back_the_same(pattern, times):
    value = pattern * times
    frame = FRAMES.pack(b"key", Entry(value, 1))
    assert FRAMES.unpack(b"key", frame).value == value
    if len(value) >= 1024:
        assert len(frame) < len(value) / 2


def test_what_does_not_compress_is_kept_as_it_is():
    value = random.Random(0).randbytes(10_000)
    assert FRAMES.pack(b"key", Entry(value, 1)).endswith(value)


@pytest.mark.parametrize("value", [b"some value", b"some value" * 1000], ids=["plain", "compressed"])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_noticed(value, data):
    frame = bytearray(FRAMES.pack(b"key", Entry(value, 12)))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] ^= 1 << data.draw(st.integers(0, 7))
    assert FRAMES.unpack(b"key", bytes(frame)) is None


@given(KEYS, st.binary(max_size=2000), st.text(min_size=1).filter(lambda secret: secret != "secret"))
def test_a_frame_made_with_another_secret_is_refused(key, value, secret):
    assert FRAMES.unpack(key, EntryFrames(secret).pack(key, Entry(value, 1))) is None


@given(KEYS, KEYS, st.binary(max_size=200))
def test_a_frame_under_another_key_is_refused(key, other, value):
    entry = FRAMES.unpack(other, FRAMES.pack(key, Entry(value, 1)))
    assert (entry is not None) == (key == other)


@given(KEYS, st.binary(max_size=200), st.integers(0, 300))
def test_a_truncated_frame_is_refused(key, value, cut):
    frame = FRAMES.pack(key, Entry(value, 1))
    assert (FRAMES.unpack(key, frame[:cut]) is None) == (cut < len(frame))


def test_a_frame_with_the_unkeyed_checksum_of_earlier_versions_is_refused():
    """Anybody who could write to Redis could make one."""
    fields = (1, 1, 1_700_000_000_000)
    checksum = blake3(b"key").update(struct.pack("<BIQ", *fields)).update(b"forged").digest(8)
    frame = struct.pack("<BxxxIQ8s", *fields, checksum) + b"forged"
    assert FRAMES.unpack(b"key", frame) is None


@given(st.binary(max_size=200))
def test_bytes_that_nobody_packed_are_refused(frame):
    assert FRAMES.unpack(b"key", frame) is None


def authentic(kind, stored):
    """A frame whose MAC is right, as a faulty process of the fleet might write it."""
    assert EntryFrames("secret")._key == blake3(b"secret", derive_key_context=_CONTEXT).digest()
    return _FRAME.pack(kind, 1, 2, FRAMES._mac(b"key", kind, 1, 2, stored)) + stored


@given(st.binary(max_size=100))
def test_authentic_bytes_that_are_not_lz4_are_refused_without_an_error(stored):
    entry = FRAMES.unpack(b"key", authentic(4, stored))
    assert entry is None or len(entry.value) == int.from_bytes(stored[:4], "little")


def test_a_value_that_says_it_grows_beyond_what_is_ever_compressed_takes_no_memory(monkeypatch):
    def decompress(_):
        raise AssertionError("memory was taken")

    bomb = lz4.block.compress(bytes(64 << 20))
    assert len(bomb) < 300_000
    monkeypatch.setattr("lz4.block.decompress", decompress)
    for stored in (bomb, b"\xff\xff\xff\xff" + bytes(10)):
        assert FRAMES.unpack(b"key", authentic(4, stored)) is None


@given(KEYS, st.binary(max_size=200), st.data())
def test_a_seal_vouches_for_one_answer_under_one_key(key, value, data):
    entry = Entry(value, 5, 1_700_000_000_000)
    seal = FRAMES.seal(key, entry)
    assert FRAMES.is_sealed(key, entry, seal)
    assert not FRAMES.is_sealed(key + b"x", entry, seal)
    assert not FRAMES.is_sealed(key, Entry(value + b"x", 5, 1_700_000_000_000), seal)
    assert not FRAMES.is_sealed(key, Entry(value, 5, 1_700_000_000_001), seal)
    assert not FRAMES.is_sealed(key, entry, EntryFrames("other").seal(key, entry))
    assert not FRAMES.is_sealed(key, entry, data.draw(st.binary(max_size=20).filter(lambda forged: forged != seal)))


def test_a_seal_is_no_frame_and_the_other_way_round():
    entry = Entry(b"value", 1, 2)
    assert FRAMES.seal(b"key", entry) not in FRAMES.pack(b"key", entry)
    assert FRAMES.seal_vector(b"", b"value", b"key") != FRAMES.seal(b"key", Entry(b"value", 0, 0))


def test_only_what_can_be_parsed_is_an_answer():
    assert is_answer(b"")
    assert not is_answer(b"value")
