"""A cached prediction, and how it is stored in Redis.

Frames are authenticated with a key derived from the fleet's secret: whoever can write to Redis, but does not know the
secret, can delete entries and cannot forge one.
"""

from __future__ import annotations  # compiled by mypyc

import hmac
import struct
import time

import lz4.block
from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.oip.v2 import grpc_service_pb2 as v2

# kind, compute time (µs), created (ms since the epoch), MAC; then the value, as it is or compressed
_FRAME = struct.Struct("<BIQ16s")
# What the MAC covers after the value and the key: kind, compute time, created, and the length of the key.
_FIELDS = struct.Struct("<BIQI")
_CONTEXT = "ringmesh 2026-11 cache entry"
# 1 and 2 were frames with an unkeyed checksum.
_PLAIN, _COMPRESSED, _SEALED, _VECTOR = 3, 4, 5, 6
_MAX_COMPUTE_US = 2**32 - 1
_MAX_CREATED_MS = 2**64 - 1
# Below, what is saved is less than what Redis itself needs for an entry; above, it would hold up the event loop.
_LEAST_COMPRESSED, _MOST_COMPRESSED = 1024, 4 << 20
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


class Frames:
    """Writes and reads frames under one fleet-wide secret: every process of a fleet must be given the same."""

    def __init__(self, secret: str) -> None:
        self._key = blake3(secret.encode(), derive_key_context=_CONTEXT).digest()

    def pack(self, key: bytes, entry: Entry) -> bytes:
        """The frame that `unpack` reads under the same key. Compressed if that saves a quarter."""
        kind, stored = _PLAIN, entry.value
        if _LEAST_COMPRESSED <= len(stored) <= _MOST_COMPRESSED:
            compressed = lz4.block.compress(stored)
            if len(compressed) <= _WORTH * len(stored):
                kind, stored = _COMPRESSED, compressed
        mac = self._mac(key, kind, entry.compute_us, entry.created_at_ms, stored)
        return _FRAME.pack(kind, entry.compute_us, entry.created_at_ms, mac) + stored

    def unpack(self, key: bytes, frame: bytes) -> Entry | None:
        """None if the frame is damaged, forged, of another kind, or was written under another key or secret."""
        if len(frame) < _FRAME.size:
            return None
        kind, compute_us, created_at_ms, mac = _FRAME.unpack_from(frame)
        stored = frame[_FRAME.size :]
        if kind not in (_PLAIN, _COMPRESSED):
            return None
        if not hmac.compare_digest(mac, self._mac(key, kind, compute_us, created_at_ms, stored)):
            return None
        value = stored if kind == _PLAIN else _decompress(stored)
        return None if value is None else Entry(value, compute_us, created_at_ms)

    def seal(self, key: bytes, entry: Entry) -> bytes:
        """16 bytes that prove to another region that `entry` is the fleet's answer under `key`."""
        return self._mac(key, _SEALED, entry.compute_us, entry.created_at_ms, entry.value)

    def is_sealed(self, key: bytes, entry: Entry, seal: bytes) -> bool:
        """Whether `seal` was made of `entry` under `key` by a process that knows the secret."""
        if not 0 <= entry.created_at_ms <= _MAX_CREATED_MS:
            return False
        return hmac.compare_digest(seal, self.seal(key, entry))

    def seal_vector(self, group: bytes, vector: bytes, key: bytes) -> bytes:
        """16 bytes that prove that a request with this `vector` of `group` was answered under `key`."""
        return self._mac(group + key, _VECTOR, len(group), 0, vector)

    def _mac(self, key: bytes, kind: int, compute_us: int, created_at_ms: int, stored: bytes) -> bytes:
        # The data first, as in keys.py. What follows can be read from its end, so no data can pass for a part of it.
        hasher = blake3(stored, key=self._key)
        return hasher.update(key + _FIELDS.pack(kind, compute_us, created_at_ms, len(key))).digest(16)


def is_answer(value: bytes) -> bool:
    """Whether it is a serialized ModelInferResponse, so that whatever reads it later will not fail."""
    try:
        v2.ModelInferResponse.FromString(value)
    except DecodeError:
        return False
    return True


def _decompress(stored: bytes) -> bytes | None:
    """None if it is not LZ4 after a size of at most _MOST_COMPRESSED, which is checked before memory is taken."""
    if int.from_bytes(stored[:4], "little") > _MOST_COMPRESSED:
        return None
    try:
        value: bytes = lz4.block.decompress(stored)
    except (lz4.block.LZ4BlockError, ValueError):
        return None
    return value
