"""Protobuf's wire format, where a message is put together from parts that are serialized already."""

from __future__ import annotations  # compiled by mypyc

_BYTES = [bytes((value,)) for value in range(256)]


def varint(number: int) -> bytes:
    """`number`, 0 or more."""
    if number < 0x80:
        return _BYTES[number]
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a submessage, bytes or text. `number` is below 16."""
    return _BYTES[number << 3 | 2] + varint(len(payload)) + payload


def head(number: int, size: int) -> bytes:
    """What stands before the `size` bytes of a length-delimited field."""
    return _BYTES[number << 3 | 2] + varint(size)
