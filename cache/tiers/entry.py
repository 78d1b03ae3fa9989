"""A cached answer, and its frame: the format in which Redis stores it.

Frames are authenticated with a key derived from the fleet's secret. A client that can write to Redis but does not know
the secret can delete entries, but cannot forge one.
"""

from __future__ import annotations  # compiled by mypyc

import hmac
import struct
import time

import lz4.block
from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.oip.v2 import grpc_service_pb2 as v2

# kind, compute time (µs), creation time (ms since the epoch), MAC; then the value, plain or compressed
_FRAME = struct.Struct("<BIQ16s")
# The MAC covers the value, the key and these fields: kind, compute time, creation time, and the length of the key.
_FIELDS = struct.Struct("<BIQI")
_CONTEXT = "ringmesh 2026-11 cache entry"
# 1 and 2 were frames with an unkeyed checksum.
_PLAIN, _COMPRESSED, _SEALED, _VECTOR = 3, 4, 5, 6
_MAX_COMPUTE_US = 2**32 - 1
_MAX_CREATED_MS = 2**64 - 1
# Compression of smaller values saves less than Redis's own overhead per entry; of larger ones, blocks the event loop.
_LEAST_COMPRESSED, _MOST_COMPRESSED = 1024, 4 << 20
# LZ4 is used if it saves at least a quarter: docs/decisions/0011.
_WORTH = 0.75


class Entry:
    """A cached value (a serialized response without id), its compute time, and its creation time.

    `hits`, `weighed_hits` and `worth` belong to the local tier: the number of hits, and the eviction priority.
    """

    __slots__ = ("compute_us", "created_at_ms", "hits", "value", "weighed_hits", "worth")

    def __init__(self, value: bytes, compute_us: int, created_at_ms: int | None = None) -> None:
        self.value = value
        self.compute_us = min(compute_us, _MAX_COMPUTE_US)
        self.created_at_ms = time.time_ns() // 1_000_000 if created_at_ms is None else created_at_ms
        self.hits = self.weighed_hits = 0
        self.worth = 0.0


class EntryFrames:
    """Writes and reads frames with the fleet-wide secret, which must be the same in every process."""

    def __init__(self, secret: str) -> None:
        self._key = blake3(secret.encode(), derive_key_context=_CONTEXT).digest()

    def pack(self, key: bytes, entry: Entry) -> bytes:
        """Returns the frame that `unpack` reads under the same key. Compresses the value if that saves a quarter."""
        kind, stored = _PLAIN, entry.value
        if _LEAST_COMPRESSED <= len(stored) <= _MOST_COMPRESSED:
            compressed = lz4.block.compress(stored)
            if len(compressed) <= _WORTH * len(stored):
                kind, stored = _COMPRESSED, compressed
        mac = self._mac(key, kind, entry.compute_us, entry.created_at_ms, stored)
        return _FRAME.pack(kind, entry.compute_us, entry.created_at_ms, mac) + stored

    def unpack(self, key: bytes, frame: bytes) -> Entry | None:
        """Returns the entry; None if the frame is damaged, forged, of another kind, or has another key or secret."""
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
        """Returns 16 bytes that prove to another region that `entry` is the fleet's answer under `key`."""
        return self._mac(key, _SEALED, entry.compute_us, entry.created_at_ms, entry.value)

    def is_sealed(self, key: bytes, entry: Entry, seal: bytes) -> bool:
        """Whether a process that knows the secret made `seal` for `entry` under `key`."""
        if not 0 <= entry.created_at_ms <= _MAX_CREATED_MS:
            return False
        return hmac.compare_digest(seal, self.seal(key, entry))

    def seal_vector(self, group: bytes, vector: bytes, key: bytes) -> bytes:
        """Returns 16 bytes that prove that a request with this `vector` of `group` was answered under `key`."""
        return self._mac(group + key, _VECTOR, len(group), 0, vector)

    def _mac(self, key: bytes, kind: int, compute_us: int, created_at_ms: int, stored: bytes) -> bytes:
        # Data comes first, as in keys.py. The rest can be parsed from its end, so data cannot be mistaken for it.
        hasher = blake3(stored, key=self._key)
        return hasher.update(key + _FIELDS.pack(kind, compute_us, created_at_ms, len(key))).digest(16)


def is_answer(value: bytes) -> bool:
    """Whether `value` is a serialized ModelInferResponse, so that later readers can parse it."""
    try:
        v2.ModelInferResponse.FromString(value)
    except DecodeError:
        return False
    return True


def _decompress(stored: bytes) -> bytes | None:
    """Returns None if the data is not LZ4, or its size prefix exceeds _MOST_COMPRESSED (checked before allocation)."""
    if int.from_bytes(stored[:4], "little") > _MOST_COMPRESSED:
        return None
    try:
        value: bytes = lz4.block.decompress(stored)
    except (lz4.block.LZ4BlockError, ValueError):
        return None
    return value
