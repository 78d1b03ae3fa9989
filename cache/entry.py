"""A cached prediction, and how it stands in Redis."""

from __future__ import annotations

import struct
import time

from blake3 import blake3

# version, compute time (µs), created (ms since the epoch), checksum over key, fields and value
_FRAME = struct.Struct("<BxxxIQ8s")
_FIELDS = struct.Struct("<BIQ")
_VERSION = 1
_MAX_COMPUTE_US = 2**32 - 1


class Entry:
    """`value` (a serialized response without id), what it took to compute, and when that was.

    `hits`, `weighed_hits` and `worth` are the local tier's: how often it was asked for, and its place there.
    """

    __slots__ = ("compute_us", "created_at_ms", "hits", "value", "weighed_hits", "worth")

    def __init__(self, value: bytes, compute_us: int, created_at_ms: int | None = None) -> None:
        self.value = value
        self.compute_us = min(compute_us, _MAX_COMPUTE_US)
        self.created_at_ms = time.time_ns() // 1_000_000 if created_at_ms is None else created_at_ms
        self.hits = self.weighed_hits = 0
        self.worth = 0.0


def pack(key: bytes, entry: Entry) -> bytes:
    """The frame that `unpack` reads under the same key."""
    checksum = _checksum(key, entry.compute_us, entry.created_at_ms, entry.value)
    return _FRAME.pack(_VERSION, entry.compute_us, entry.created_at_ms, checksum) + entry.value


def unpack(key: bytes, frame: bytes) -> Entry | None:
    """None where the frame is damaged, of another version, or was written under another key."""
    if len(frame) < _FRAME.size:
        return None
    version, compute_us, created_at_ms, checksum = _FRAME.unpack_from(frame)
    value = frame[_FRAME.size :]
    if version != _VERSION or checksum != _checksum(key, compute_us, created_at_ms, value):
        return None
    return Entry(value, compute_us, created_at_ms)


def _checksum(key: bytes, compute_us: int, created_at_ms: int, value: bytes) -> bytes:
    return blake3(key).update(_FIELDS.pack(_VERSION, compute_us, created_at_ms)).update(value).digest(8)
