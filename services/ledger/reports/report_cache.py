"""Answers of reports in the fleet's cache, `ringmesh.cache.v1`.

A key names the question, the prices, and the version of the roll-ups of each day that it covers: what changed is not
found any more, so nothing has to be deleted. A cache that is down or slow is skipped for a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import grpc
from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.prices import PriceBook
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.times import DAY_MS, day_of
from services.runtime.rpc.access import CREDENTIAL
from services.runtime.rpc.client_metadata import sending
from services.runtime.rpc.service_tls import ServiceTls, open_channel
from services.runtime.telemetry.supervisor import BACKGROUND

_NAMESPACE = "ringmesh-ledger"
# A caller waits for a look-up, and nobody for what is stored.
_GET_SECONDS = 0.1
_PUT_SECONDS = 5.0
_SKIP_SECONDS = 1.0
_TTL_MS = DAY_MS

Report = TypeVar("Report", ledger_pb2.ReportResponse, ledger_pb2.BillResponse)


class ReportCache:
    """Through the cache service at `address`, with the fleet's `credential`; None: nothing is cached."""

    def __init__(self, address: str | None, credential: str, tls: ServiceTls | None = None) -> None:
        options, sends = (("grpc.enable_http_proxy", 0),), sending(CREDENTIAL, credential)
        self._channel = open_channel(address, options, sends, tls) if address else None
        self._stub = cache_pb2_grpc.CacheServiceStub(self._channel) if self._channel is not None else None
        self._skip_until = 0.0
        self.hits = self.misses = self.failures = 0

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def get(self, key: bytes, kind: type[Report]) -> Report | None:
        """None where it is not there, or the cache does not answer."""
        if self._stub is None or time.monotonic() < self._skip_until:
            return None
        try:
            answer = await self._stub.Get(cache_pb2.GetRequest(key=key, namespace=_NAMESPACE), timeout=_GET_SECONDS)
        except grpc.aio.AioRpcError:
            self.failures += 1
            self._skip_until = time.monotonic() + _SKIP_SECONDS
            return None
        if not answer.HasField("entry"):
            self.misses += 1
            return None
        try:
            found = kind.FromString(answer.entry.value)
        except DecodeError:
            self.failures += 1
            return None
        self.hits += 1
        found.cached = True
        return found

    def put(self, key: bytes, answer: ledger_pb2.ReportResponse | ledger_pb2.BillResponse, compute_us: int) -> None:
        """In the background. One that fails says nothing of look-ups: the cache may refuse what is too large."""
        if self._stub is None or time.monotonic() < self._skip_until:
            return
        request = cache_pb2.PutRequest(
            key=key, value=answer.SerializeToString(), compute_us=compute_us, namespace=_NAMESPACE, ttl_ms=_TTL_MS
        )
        BACKGROUND.once("report cache", partial(self._put, self._stub, request))

    async def _put(self, stub: cache_pb2_grpc.CacheServiceAsyncStub, request: cache_pb2.PutRequest) -> None:
        try:
            await stub.Put(request, timeout=_PUT_SECONDS)
        except grpc.aio.AioRpcError:
            self.failures += 1


async def versions(connection: Connection, ranges: Sequence[TimeRange]) -> bytes:
    """Of the roll-ups that an answer over `ranges` is made of."""
    rows = await connection.fetch(
        "SELECT v.day, v.version FROM day_version v JOIN unnest($1::date[], $2::date[]) AS r(first, last) "
        "ON v.day BETWEEN r.first AND r.last ORDER BY 1",
        [day_of(range_.from_ms) for range_ in ranges],
        [day_of(range_.until_ms - 1) for range_ in ranges],
    )
    return repr([(row[0].toordinal(), row[1]) for row in rows]).encode()


def key(question: object, book: PriceBook, version: bytes) -> bytes:
    """32 bytes; `question` says all of itself in its repr."""
    return blake3(repr((question, book.currency, book.prices)).encode() + version).digest()
