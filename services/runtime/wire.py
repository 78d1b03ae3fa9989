"""Protobuf's wire format, for messages that are assembled from serialized parts."""

from __future__ import annotations  # compiled by mypyc

_BYTES = [bytes((value,)) for value in range(256)]


def varint(number: int) -> bytes:
    """Encodes `number`, which is 0 or more."""
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
    """Encodes a length-delimited field: a submessage, bytes or text. `number` is below 16."""
    return _BYTES[number << 3 | 2] + varint(len(payload)) + payload


def head(number: int, size: int) -> bytes:
    """Encodes the tag and length that precede the `size` bytes of a length-delimited field."""
    return _BYTES[number << 3 | 2] + varint(size)
