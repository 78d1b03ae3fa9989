"""Protobuf's wire format, where a message is put together from parts that are serialized already."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """`number`, 0 or more."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a submessage, bytes or text. `number` is below 16."""
    return b"".join((bytes((number << 3 | 2,)), varint(len(payload)), payload))
