"""Caches of peer regions. A miss asks them if the cost check (worth_asking.py) allows it; the first answer wins.

A cache key covers the content that an answer was computed from and the purges since, so a peer's answer under an equal
key is correct here. Peers report purges to each other through `Watch`. A circuit breaker skips a peer that fails or
hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError
from ringmesh.cache.v1 import cache_pb2

from cache.keys.invalidation import InvalidationLog
from cache.policy.worth_asking import LookUpDecision, WorthAsking
from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames, is_answer
from services.runtime import faults
from services.runtime.errors import RingmeshError
from services.runtime.rpc.access import CREDENTIAL
from services.runtime.rpc.service_tls import ServiceTls, open_channel
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_SERVICE = "/ringmesh.cache.v1.CacheService/"
_PROBE_SECONDS = 2.0
_LONGEST_SECONDS = 2.0
_CALLS = 8
_MAX_KEYS = 64
# Computing starts in parallel if no peer has answered within this many mean trip times.
_PATIENCE = 2.0
_SMOOTHING = 0.2

_RawCall: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
_RawStream: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"
Result = TypeVar("Result")


class PeerError(Exception):
    """A peer's reply is malformed; the message says how."""


FAILURES: Final = (grpc.aio.AioRpcError, DecodeError, asyncio.TimeoutError, OSError, PeerError)


class PeerRegion:
    """The cache service of `region` at `address`, which must seal its answers with the secret of `frames`.

    `trip_seconds` is the smoothed trip time; infinite before the first trip. `unsealed` counts the answers that were
    dropped because their seal or their content was invalid.
    """

    def __init__(
        self,
        region: str,
        address: str,
        breaker: Breaker,
        frames: EntryFrames,
        credential: str = "",
        tls: ServiceTls | None = None,
    ) -> None:
        self.region = region
        self._frames = frames
        self.trip_seconds = float("inf")
        self.worth = WorthAsking()
        self.unsealed = 0
        self._breaker = breaker
        self._channel = open_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.use_local_subchannel_pool", 1),
            ],
            tls=tls,
        )
        self._fetch: _RawCall = self._channel.unary_unary(_SERVICE + "Fetch")
        self._list: _RawCall = self._channel.unary_unary(_SERVICE + "ListValuable")
        self._watch: _RawStream = self._channel.unary_stream(_SERVICE + "Watch")
        self._metadata = ((CREDENTIAL, credential),) if credential else ()
        self._waiting: dict[bytes, asyncio.Future[Entry | None]] = {}
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def is_up(self) -> bool:
        return not self._breaker.is_open

    async def get(self, key: bytes) -> Entry | None:
        """Looks up one key. Returns None on a miss and on any failure. Waiting look-ups are sent in one call."""
        waiter = self._waiting.get(key)
        if waiter is None:
            waiter = self._waiting[key] = asyncio.get_running_loop().create_future()
        self._send()
        return await asyncio.shield(waiter)

    async def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Looks up `keys` in one call. Raises one of FAILURES."""
        start = time.monotonic()
        timeout = min(_LONGEST_SECONDS, max(0.1, 10 * self.trip_seconds))
        data = await self._fetch(
            cache_pb2.FetchRequest(keys=keys).SerializeToString(), timeout=timeout, metadata=self._metadata
        )
        results = cache_pb2.FetchResponse.FromString(data).results
        if len(results) != len(keys):
            raise PeerError(f"it answered {len(results)} of {len(keys)} look-ups")
        found = [self._entry(key, each) for key, each in zip(keys, results, strict=True)]
        trip = time.monotonic() - start
        known = self.trip_seconds
        self.trip_seconds = trip if known == float("inf") else known + _SMOOTHING * (trip - known)
        return found

    def _entry(self, key: bytes, result: cache_pb2.GetResponse) -> Entry | None:
        """Returns the entry; None on a miss, or if the seal or the content is invalid."""
        if not result.HasField("entry"):
            return None
        answer = result.entry
        entry = Entry(answer.value, answer.compute_us, answer.created_at_ms)
        if self._frames.is_sealed(key, entry, answer.seal) and is_answer(answer.value):
            return entry
        if not self.unsealed:
            log.warning(
                "peer region %s answered without a valid seal, which is ignored: it must run this version with the "
                "same RINGMESH_KEY_SECRET",
                self.region,
            )
        self.unsealed += 1
        return None

    async def valuable(self) -> list[bytes]:
        """Returns the keys that save the peer most compute time. Raises one of FAILURES."""
        data = await self._list(b"", timeout=_LONGEST_SECONDS, metadata=self._metadata)
        return list(cache_pb2.ListValuableResponse.FromString(data).keys)

    async def probe_on(self) -> None:
        """Measures the trip time periodically, and probes the peer while its breaker is open."""
        while True:
            if self._breaker.allow():
                try:
                    await self.get_many(())
                    if self._breaker.is_open:
                        log.info("peer region %s answers", self.region)
                    self._breaker.success()
                except FAILURES as error:
                    self._failed(error)
            await asyncio.sleep(_PROBE_SECONDS)

    async def watch_on(self, purges: InvalidationLog) -> None:
        """Applies the peer's purges as they arrive."""
        while True:
            with contextlib.suppress(*FAILURES, RingmeshError):
                async for data in self._watch(b"", metadata=self._metadata):
                    await purges.merge(cache_pb2.WatchResponse.FromString(data).purges)
            await asyncio.sleep(_PROBE_SECONDS)

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        await self._channel.close()

    def _send(self) -> None:
        while self._waiting and len(self._calls) < _CALLS:
            keys = list(self._waiting)[:_MAX_KEYS]
            call = asyncio.create_task(self._ask({key: self._waiting.pop(key) for key in keys}))
            self._calls.add(call)
            call.add_done_callback(self._called)

    def _called(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _ask(self, waiters: dict[bytes, asyncio.Future[Entry | None]]) -> None:
        found: Sequence[Entry | None] = ()
        try:
            if self.is_up:
                found = await self.get_many(tuple(waiters))
        except Exception as error:
            self._failed(error)
        finally:
            for index, waiter in enumerate(waiters.values()):
                if not waiter.done():
                    waiter.set_result(found[index] if index < len(found) else None)

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, FAILURES):
            faults.internal(log, f"a look-up in peer region {self.region} failed", error)
        elif not self._breaker.is_open:
            log.warning("peer region %s is skipped for now: %r", self.region, error)
        self._breaker.failure()


class PeerRegions:
    """The peer regions of this process."""

    def __init__(self, peers: Sequence[PeerRegion], purges: InvalidationLog) -> None:
        self.peers = peers
        self._purges = purges
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for peer in self.peers:
            self._tasks.append(BACKGROUND.start("probe of a peer region", peer.probe_on))
            self._tasks.append(BACKGROUND.start("purges of a peer region", partial(peer.watch_on, self._purges)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(peer.close() for peer in self.peers))

    def worth_asking(
        self, subject: bytes, key: bytes, compute_seconds: float | None
    ) -> dict[PeerRegion, LookUpDecision]:
        """Returns the available peers that pass the cost check; none if the compute time is unknown."""
        if compute_seconds is None:
            return {}
        decisions = {
            peer: peer.worth.decide(subject, key, compute_seconds, peer.trip_seconds)
            for peer in self.peers
            if peer.is_up
        }
        return {peer: decision for peer, decision in decisions.items() if decision.asks}

    async def race(
        self,
        peers: Mapping[PeerRegion, LookUpDecision],
        subject: bytes,
        key: bytes,
        compute: Callable[[], Awaitable[Result]],
        usable: Callable[[Entry], bool],
    ) -> Entry | Result:
        """Returns the first answer: a peer's entry if it is `usable`, or the computed one. Cancels the rest.

        Computing starts when all peers have missed, or none has answered within two mean trip times; it starts
        immediately if no decision waits. If no peer has an answer, raises the error of `compute`.
        """
        loop = asyncio.get_running_loop()
        asks = {asyncio.ensure_future(peer.get(key)): peer for peer in peers}
        begin = loop.time()
        if any(decision.waits for decision in peers.values()):
            begin += _PATIENCE * min(peer.trip_seconds for peer in peers)
        computing: asyncio.Future[Result] | None = None
        try:
            while True:
                running: list[asyncio.Future[Any]] = [*asks]
                timeout: float | None = max(0.0, begin - loop.time())
                if computing is not None:
                    running.append(computing)
                    timeout = None
                await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for ask in [each for each in asks if each.done()]:
                    peer, entry = asks.pop(ask), ask.result()
                    if peer.is_up:
                        peer.worth.learn(subject, hit=entry is not None)
                    if entry is not None and usable(entry):
                        return entry
                if computing is None:
                    if not asks or loop.time() >= begin:
                        computing = asyncio.ensure_future(compute())
                        await asyncio.sleep(0)
                elif computing.done() and (computing.exception() is None or not asks):
                    return computing.result()
                elif computing.done():
                    await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for left in (*asks, computing):
                if left is not None and not left.done():
                    left.cancel()
