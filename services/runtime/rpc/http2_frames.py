"""Frames of HTTP/2 (RFC 9113), as both ends of a connection write and read them."""

from __future__ import annotations  # compiled by mypyc

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Types and flags, section 6.
DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY: Final = 0x20
# Settings, section 6.5.2.
HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
# Error codes, section 7.
NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
STREAM_CLOSED: Final = 5
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

# What a side takes until it says otherwise, and the largest window and number of a stream.
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME: Final = 16_384
MAX: Final = 2**31 - 1
HEAD_BYTES: Final = 9
# The head of a frame: its length in two parts, type, flags, and stream.
HEAD: Final = struct.Struct(">BHBBI")
NUMBER: Final = struct.Struct(">I")
_PRIORITY_BYTES: Final = 5


class ProtocolError(Exception):
    """The other side broke the protocol; the connection ends with an error code of HTTP/2."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def head(size: int, kind: int, flags: int, number: int) -> bytes:
    """Returns the head of a frame with `size` bytes."""
    return HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, number)


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return head(len(payload), kind, flags, number) + payload


def opening(settings: tuple[tuple[int, int], ...]) -> bytes:
    """The settings of a side that takes as much as it can on the connection."""
    payload = b"".join([struct.pack(">HI", *setting) for setting in settings])
    return frame(SETTINGS, 0, 0, payload) + window_update(0, MAX - DEFAULT_WINDOW)


def goaway(last: int, code: int, why: str = "") -> bytes:
    """Asks the other side to make no calls after stream `last` on this connection."""
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + why.encode())


def reset(number: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, number, NUMBER.pack(code))


def window_update(number: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, number, NUMBER.pack(more))


def fragment(payload: bytes, flags: int) -> bytes:
    """The part of a header block that a HEADERS frame has. Raises ProtocolError."""
    if flags & PADDED:
        payload = unpadded(payload)
    if flags & PRIORITY:
        if len(payload) < _PRIORITY_BYTES:
            raise ProtocolError(FRAME_SIZE_ERROR, "a frame without its priority")
        payload = payload[_PRIORITY_BYTES:]
    return payload


def unpadded(payload: bytes) -> bytes:
    """What a frame has between the length of its padding and the padding. Raises ProtocolError."""
    end = len(payload) - payload[0] if payload else 0
    if end < 1:
        raise ProtocolError(PROTOCOL_ERROR, "a frame with more padding than fits")
    return payload[1:end]
