"""Sends what is spooled to the ledger, one batch after the other, until it is acknowledged. No request waits for it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from router.accounting.ledger_spool import LedgerSpool, Spooled
from router.accounting.usage_batch import is_empty
from services.runtime.rpc.access import CREDENTIAL
from services.runtime.rpc.client_metadata import sending
from services.runtime.rpc.rpc import refused_field
from services.runtime.rpc.service_tls import ServiceTls, open_channel
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

WAITING = Family("ringmesh_usage_waiting_batches", "gauge", "batches of usage records that the ledger has not yet")
BYTES = Family("ringmesh_usage_spool_bytes", "gauge", "bytes of those on disk")
SENT = Family("ringmesh_usage_sent_batches_total", "counter", "batches of usage records that the ledger acknowledged")
FAILURES = Family("ringmesh_usage_send_failures_total", "counter", "attempts to send a batch that failed")
DROPPED = Family("ringmesh_usage_dropped_requests_total", "counter", "requests that the ledger does not account for")

_SECONDS: Final = 10.0
_LEASE_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_REJECTED = "rejected"
_RESULTS: Final = (
    ledger_pb2.AppendResponse.RESULT_WRITTEN,
    ledger_pb2.AppendResponse.RESULT_DUPLICATE,
    ledger_pb2.AppendResponse.RESULT_GAP,
)


class LedgerSender:
    """From `spool` to the ledger at `address`, with the fleet's `credential`. The spool is used by nobody else."""

    def __init__(self, spool: LedgerSpool, address: str, credential: str = "", tls: ServiceTls | None = None) -> None:
        self._spool = spool
        options = (("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 2000))
        self._channel = open_channel(address, options, sending(CREDENTIAL, credential), tls)
        self._stub = ledger_pb2_grpc.LedgerServiceStub(self._channel)
        self._wake = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._disk = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.sent = self.failures = 0

    @property
    def router_id(self) -> str:
        """The producer's id; "" until the spool is open."""
        return self._spool.router_id

    @property
    def epoch(self) -> int:
        """The producer's start epoch."""
        return self._spool.epoch

    @property
    def is_idle(self) -> bool:
        """Whether the ledger has acknowledged all that was submitted."""
        return not len(self._spool)

    @property
    def dropped_requests(self) -> int:
        """Requests that the ledger will never account for."""
        return self._spool.dropped_requests

    def start(self) -> None:
        """Ends with `close`."""
        self._task = BACKGROUND.start("usage to the ledger", self._run)

    async def close(self, seconds: float) -> None:
        """Gives what waits up to `seconds` to be sent; the rest stays in the spool."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_sent.wait()
        if self._task is not None:
            await BACKGROUND.end(self._task)
        await self._channel.close()
        self._spool.close()

    async def submit(self, batch: bytes, records: int, requests: int) -> None:
        """Returns when the batch is spooled. Cancelled: it may be all the same."""
        async with self._disk:
            await asyncio.to_thread(self._spool.append, batch, records, requests)
        self._all_sent.clear()
        self._wake.set()

    async def lease(self, request: ledger_pb2.LeaseRequest) -> ledger_pb2.LeaseResponse | None:
        """Asks for leases of budgets. None if the ledger does not answer."""
        try:
            answer: ledger_pb2.LeaseResponse = await self._stub.Lease(request, timeout=_LEASE_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.debug("the ledger gives no leases now: %s: %s", error.code().name, error.details())
            return None
        with suppress(OSError):  # the disk is full
            async with self._disk:
                await asyncio.to_thread(self._spool.save_leases, answer.SerializeToString(deterministic=True))
        return answer

    @property
    def last_leases(self) -> ledger_pb2.LeaseResponse:
        """The ledger's last answer to `lease`, also from before a restart; empty if there is none."""
        try:
            return ledger_pb2.LeaseResponse.FromString(self._spool.leases)
        except DecodeError:
            return ledger_pb2.LeaseResponse()

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`."""
        yield Sample(WAITING, (), len(self._spool))
        yield Sample(BYTES, (), self._spool.bytes)
        yield Sample(SENT, (), self.sent)
        yield Sample(FAILURES, (), self.failures)
        yield Sample(DROPPED, (), self.dropped_requests)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            first = self._spool.first()
            if first is None:
                self._wake.clear()
                self._all_sent.set()
                await self._wake.wait()
            elif await self._send(first):
                pause = _FIRST_PAUSE_SECONDS
            else:
                self.failures += 1
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _send(self, one: Spooled) -> bool:
        """Sends a batch. Returns False if the same batch must be sent again after a pause."""
        try:
            async with self._disk:
                batch, digest = await asyncio.to_thread(self._spool.read, one)
        except OSError as error:
            log.warning("cannot read batch %s now: %s", one.name, error.strerror)
            return False
        request = ledger_pb2.AppendRequest(
            router_id=self._spool.router_id, start_epoch=one.epoch, sequence=one.sequence, batch=batch, digest=digest
        )
        try:
            answer = await self._stub.Append(request, timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            return await self._refused(one, batch, error)
        async with self._disk:
            if answer.result not in _RESULTS:
                return False  # it was damaged on its way
            if answer.result == ledger_pb2.AppendResponse.RESULT_GAP:
                log.error(
                    "the ledger has batches up to %d and not %d: it lost some", answer.last_sequence, one.sequence
                )
                await asyncio.to_thread(self._spool.begin_again)
            else:
                self.sent += 1
                await asyncio.to_thread(self._spool.written, one)
        return True

    async def _refused(self, one: Spooled, batch: bytes, error: grpc.aio.AioRpcError) -> bool:
        details = error.details() or ""
        async with self._disk:
            match error.code():
                case grpc.StatusCode.INVALID_ARGUMENT if not refused_field(error).startswith("batch"):
                    # Not what the batch says is refused, so it was damaged on its way: in the spool, it was whole.
                    log.warning("batch %s came damaged to the ledger, and is sent again: %s", one.name, details)
                    return False
                case grpc.StatusCode.INVALID_ARGUMENT:
                    log.error("the ledger refuses usage of %d requests: %s", one.requests, details)
                    await asyncio.to_thread(self._spool.give_up, one, _REJECTED)
                    return bool(one.records)  # if the replacement is refused too, pause
                case grpc.StatusCode.FAILED_PRECONDITION if "start a new epoch" in details:
                    if not one.records and is_empty(batch):
                        # It stands for one that was written before its file was damaged.
                        await asyncio.to_thread(self._spool.written, one)
                    else:
                        log.error("another router has this one's id; it goes on with a new one: %s", details)
                        await asyncio.to_thread(self._spool.begin_again, is_shared=True)
                    return True
        denied = error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        level = logging.WARNING if denied else logging.DEBUG
        log.log(level, "the ledger does not take usage now: %s: %s", error.code().name, error.details())
        return False
