"""The semantic tier: vectors of earlier requests in this process, and in Redis if Redis supports vector search.

Uses FT.CREATE and FT.SEARCH of Redis's query engine (Redis Stack, Redis 8) and of valkey-search. A server that lacks or
refuses these commands, is down, or is slow is skipped for a while. Meanwhile only the index of the process is used.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from redis.exceptions import NoPermissionError, ResponseError

from cache.semantic.semantic_index import Near, SemanticIndex, Vector, unit
from cache.tiers.shared_tier import SharedTier
from services.runtime.errors import UnavailableError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# One hash tag keeps all vectors on one server of a cluster, so that the index of that server is complete.
_PREFIX = b"{rm1-mesh}:similar:"
_ABSENT_SECONDS = 60.0
_DOWN_SECONDS = 1.0
_WRITE_SECONDS = 1.0
_MOST_WRITES = 64
_MOST_DIMENSIONS = 32_768  # Redis's own bound


class Document(NamedTuple):
    """An earlier request as stored in Redis: the key of its answer, its unit vector, and the MAC of both."""

    key: bytes
    vector: bytes
    seal: bytes


class SemanticTier:
    """Vectors with the keys of their answers, compared only within a group. `shared` is None without Redis."""

    def __init__(self, shared: SharedTier | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = SemanticIndex()
        self._shared = shared
        self._clock = clock
        self._not_before = 0.0
        self._made: set[bytes] = set()
        self._writes: set[asyncio.Task[None]] = set()

    @property
    def searches_redis(self) -> bool:
        shared = self._shared
        return shared is not None and self._clock() >= self._not_before and not shared.is_skipped

    async def nearest(self, group: bytes, vector: Vector, threshold: float) -> Near | None:
        """Returns the nearest vector in this process, otherwise the nearest in Redis; None below the `threshold`."""
        near = self._index.nearest(group, vector)
        if near is None or near.similarity < threshold:
            near = await self._search(group, vector)
        return near if near is not None and near.similarity >= threshold else None

    def add(self, group: bytes, vector: Vector, key: bytes) -> None:
        """Adds the vector in this process, and in Redis in the background. Ignores a vector without direction."""
        self._index.add(group, vector, key)
        direction = unit(vector)
        if direction is None or direction.size > _MOST_DIMENSIONS or not self.searches_redis:
            return
        if len(self._writes) < _MOST_WRITES:
            task = BACKGROUND.once("semantic index", partial(self._write, group, direction, key))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _search(self, group: bytes, vector: Vector) -> Near | None:
        direction = unit(vector)
        if direction is None or direction.size > _MOST_DIMENSIONS or not self.searches_redis:
            return None
        query = f"(@group:{{{group.hex()}}})=>[KNN 1 @vector $vector AS distance]"
        assert self._shared is not None
        reply = await self._run(
            self._shared.budget_seconds,
            *("FT.SEARCH", _index_name(direction), query, "PARAMS", "2", "vector", direction.tobytes()),
            *("RETURN", "3", "key", "vector", "seal", "DIALECT", "2"),
        )
        if isinstance(reply, Exception):
            self._made.discard(_index_name(direction))  # a replaced server has lost the index
            return None
        document = document_of(reply)
        if document is None or not self._is_sealed(group, document) or len(document.vector) != direction.nbytes:
            return None
        found = np.frombuffer(document.vector, direction.dtype)
        return Near(document.key, float(found @ direction))

    def _is_sealed(self, group: bytes, document: Document) -> bool:
        """Whether a process that knows the fleet's secret wrote the document. Redis itself is not trusted."""
        assert self._shared is not None
        seal = self._shared.frames.seal_vector(group, document.vector, document.key)
        return hmac.compare_digest(seal, document.seal)

    async def _write(self, group: bytes, direction: Vector, key: bytes) -> None:
        name = _index_name(direction)
        if name not in self._made:
            made = await self._run(
                _WRITE_SECONDS,
                *("FT.CREATE", name, "ON", "HASH", "PREFIX", "1", name + b":", "SCHEMA", "group", "TAG"),
                *("vector", "VECTOR", "HNSW", "6", "TYPE", "FLOAT32", "DIM", str(direction.size)),
                *("DISTANCE_METRIC", "COSINE"),
            )
            if made is None or (isinstance(made, Exception) and "exists" not in str(made)):
                return
            self._made.add(name)
        document = name + b":" + key
        assert self._shared is not None
        vector = direction.tobytes()
        seal = self._shared.frames.seal_vector(group, vector, key)
        await self._run(
            _WRITE_SECONDS, "HSET", document, "group", group.hex(), "vector", vector, "key", key, "seal", seal
        )
        await self._run(_WRITE_SECONDS, "PEXPIRE", document, str(self._shared.ttl_ms))

    async def _run(self, seconds: float, *command: str | bytes) -> Any:
        """Returns the reply; a ResponseError if the server refuses the command; None if Redis is skipped from now."""
        assert self._shared is not None
        try:
            return await self._shared.run(_PREFIX, seconds, *command)
        except UnavailableError as error:
            cause = error.__cause__
        if not isinstance(cause, ResponseError):
            log.debug("Redis is not searched for similar vectors for now: %r", cause)
            self._not_before = self._clock() + _DOWN_SECONDS
            return None
        if isinstance(cause, NoPermissionError) or "unknown command" in str(cause).lower()[:100]:
            log.info("only this process is searched for similar vectors: Redis answers %s", str(cause)[:100])
            self._not_before = self._clock() + _ABSENT_SECONDS
            return None
        return cause


def document_of(reply: Any) -> Document | None:
    """Parses the first result of FT.SEARCH, a map (RESP3, Redis) or a list (RESP2, valkey-search); None if invalid."""
    try:
        if isinstance(reply, dict):
            fields = reply[b"results"][0][b"extra_attributes"]
        else:
            fields = dict(zip(reply[2][::2], reply[2][1::2], strict=True))
        return Document(bytes(fields[b"key"]), bytes(fields[b"vector"]), bytes(fields[b"seal"]))
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _index_name(direction: Vector) -> bytes:
    return _PREFIX + str(direction.size).encode()
