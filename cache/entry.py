"""A cached prediction, and how it stands in Redis."""

from __future__ import annotations

import struct
import time

import lz4.block
from blake3 import blake3

# kind, compute time (µs), created (ms since the epoch), checksum over key, fields and what follows
_FRAME = struct.Struct("<BxxxIQ8s")
_FIELDS = struct.Struct("<BIQ")
_PLAIN, _COMPRESSED = 1, 2
_MAX_COMPUTE_US = 2**32 - 1
# Below, what is saved is less than what Redis itself needs for an entry; above, it would hold up the event loop.
_LEAST_COMPRESSED, _MOST_COMPRESSED = 1024, 16 << 20
# LZ4, kept where it saves a quarter: docs/decisions/0011.
_WORTH = 0.75


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
    """The frame that `unpack` reads under the same key. Compressed where that pays."""
    kind, stored = _PLAIN, entry.value
    if _LEAST_COMPRESSED <= len(stored) <= _MOST_COMPRESSED:
        compressed = lz4.block.compress(stored)
        if len(compressed) <= _WORTH * len(stored):
            kind, stored = _COMPRESSED, compressed
    checksum = _checksum(key, kind, entry.compute_us, entry.created_at_ms, stored)
    return _FRAME.pack(kind, entry.compute_us, entry.created_at_ms, checksum) + stored


def unpack(key: bytes, frame: bytes) -> Entry | None:
    """None where the frame is damaged, of another kind, or was written under another key."""
    if len(frame) < _FRAME.size:
        return None
    kind, compute_us, created_at_ms, checksum = _FRAME.unpack_from(frame)
    stored = frame[_FRAME.size :]
    if kind not in (_PLAIN, _COMPRESSED) or checksum != _checksum(key, kind, compute_us, created_at_ms, stored):
        return None
    value = stored if kind == _PLAIN else lz4.block.decompress(stored)
    return Entry(value, compute_us, created_at_ms)


def _checksum(key: bytes, kind: int, compute_us: int, created_at_ms: int, stored: bytes) -> bytes:
    return blake3(key).update(_FIELDS.pack(kind, compute_us, created_at_ms)).update(stored).digest(8)
