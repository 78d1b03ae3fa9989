"""The way to one worker: requests for it leave in envelopes.

Waiting is batching: while DEPTH envelopes for a model are under way, what arrives for that model gathers
and leaves as the next one. An idle way adds no wait, and a busy one pays the price of a call once for many
requests. Models have lanes of their own, so that a slow one holds up
no other.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2

from router.grpc_channel import CallError, GrpcChannel
from router.load import WorkerLoad
from services.runtime.errors import DeadlineExceededError, from_status

# One envelope at work on the worker, one on the way: it never waits for us.
DEPTH = 2
MAX_ITEMS = 64
MAX_BYTES = 4 << 20
_WITHDRAW_SECONDS = 1.0

_EXECUTE = "/ringmesh.inference.v1.InferenceWorkerService/Execute"
_WITHDRAW = "/ringmesh.inference.v1.InferenceWorkerService/Withdraw"
_DESCRIBE = "/ringmesh.inference.v1.InferenceWorkerService/Describe"


class WorkerUnreachableError(Exception):
    """The transport to a worker failed, or it is leaving: another may answer. The message says how."""


class WorkerLostError(WorkerUnreachableError):
    """It was lost with the request under way, which may be what ended it."""


class Work(NamedTuple):
    """One request on its way. `deadline` is in time.monotonic."""

    request: bytes
    request_hash: bytes
    deadline: float | None
    traceparent: str


class WorkerLink:
    """A channel to the worker at `address`, with a lane of envelopes for each model."""

    def __init__(self, address: str, load: WorkerLoad) -> None:
        self.address = address
        self._load = load
        # Requests in the envelopes under way.
        self._under_way = 0
        self._channel = GrpcChannel(address)
        self._lanes: dict[bytes, _Lane] = {}
        self._calls: set[asyncio.Task[None]] = set()
        # Trace contexts of what was sent and nobody waits for any more.
        self._unwanted: list[str] = []

    async def execute(self, model_digest: bytes, work: Work) -> inference_pb2.WorkResult:
        """The worker's result, success or failure. Raises WorkerUnreachableError.

        Cancelling it leaves others be; what the worker has not begun by then it does not run.
        """
        lane = self._lanes.get(model_digest)
        if lane is None:
            lane = self._lanes[model_digest] = _Lane()
        result: asyncio.Future[inference_pb2.WorkResult] = asyncio.get_running_loop().create_future()
        lane.waiting.append((work, result))
        if not lane.sending:
            # After all that this turn of the loop brings: what callers sent together leaves together.
            lane.sending = True
            asyncio.get_running_loop().call_soon(self._send, lane)
        self._load.sent()
        try:
            return await result
        except asyncio.CancelledError:
            if not any(future is result for _, future in lane.waiting):
                self._withdraw(work.traceparent)
            raise
        finally:
            self._load.ended()

    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse:
        """What the worker holds, if it says so in `seconds`; without models where that is `known_version`.

        Raises WorkerUnreachableError.
        """
        request = inference_pb2.DescribeRequest(known_version=known_version).SerializeToString()
        try:
            response = inference_pb2.DescribeResponse.FromString(await self._timed(_DESCRIBE, request, seconds))
            self._load.reported(response.load, self._under_way)
            await self._channel.use_socket(response.socket, response.port)
            return response
        except CallError as error:
            raise WorkerUnreachableError(str(error)) from None
        except DecodeError:
            raise WorkerUnreachableError("it does not answer as a worker does") from None

    async def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """One call of another method. Raises the worker's own error, or WorkerUnreachableError."""
        try:
            return await self._timed(method, request, seconds)
        except CallError as error:
            if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise WorkerUnreachableError(str(error)) from None
            raise from_status(error.code, error.details) from None

    async def _timed(self, method: str, request: bytes, seconds: float) -> bytes:
        try:
            async with asyncio.timeout(seconds):
                return await self._channel.call(method, request)
        except TimeoutError:
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {seconds:g} s") from None

    def give_up(self) -> None:
        """Ends what is under way, so that it is retried elsewhere: the worker stopped answering."""
        for call in self._calls:
            call.cancel()

    def forget_lanes(self, model_digests: frozenset[bytes]) -> None:
        """Drops the idle lanes of models that the worker no longer holds."""
        for digest in [d for d, lane in self._lanes.items() if d not in model_digests and not lane.busy]:
            del self._lanes[digest]

    async def close(self) -> None:
        """Ends what is under way and disconnects."""
        self.give_up()
        await self._channel.close()

    def _withdraw(self, traceparent: str) -> None:
        if not self._unwanted:
            # Of many that are cancelled together, one call tells.
            asyncio.get_running_loop().call_soon(self._tell_unwanted)
        self._unwanted.append(traceparent)

    def _tell_unwanted(self) -> None:
        request = inference_pb2.WithdrawRequest(traceparents=self._unwanted)
        self._unwanted = []
        self._spawn(self._tell(request.SerializeToString()))

    async def _tell(self, withdraw: bytes) -> None:
        with suppress(CallError):  # then it runs in vain
            await self._timed(_WITHDRAW, withdraw, _WITHDRAW_SECONDS)

    def _send(self, lane: _Lane) -> None:
        lane.sending = False
        while lane.waiting and lane.under_way < DEPTH:
            lane.under_way += 1
            self._spawn(self._call(lane, lane.next_envelope()))

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, lane: _Lane, items: list[_Item]) -> None:
        try:
            if not items:
                return
            self._under_way += len(items)
            try:
                answer = await self._channel.call(_EXECUTE, _envelope(items))
            finally:
                self._under_way -= len(items)
            response = inference_pb2.ExecuteResponse.FromString(answer)
            self._load.reported(response.load, self._under_way)
            for (_, future), result in zip(items, response.results, strict=True):
                if not future.done():
                    future.set_result(result)
        except CallError as error:
            _fail(items, (WorkerLostError if error.lost else WorkerUnreachableError)(str(error)))
        except asyncio.CancelledError:
            _fail(items, WorkerUnreachableError("it stopped answering"))
        except Exception as error:
            _fail(items, WorkerUnreachableError(f"it answered with something else than an envelope: {error!r}"))
        finally:
            lane.under_way -= 1
            self._send(lane)


_Item = tuple[Work, "asyncio.Future[inference_pb2.WorkResult]"]


class _Lane:
    """What waits for one model on one worker."""

    __slots__ = ("sending", "under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Item] = deque()
        self.under_way = 0
        self.sending = False

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.under_way)

    def next_envelope(self) -> list[_Item]:
        """What leaves now: one item, then as many as fit; without those whose caller has gone or is late."""
        items: list[_Item] = []
        size = 0
        now = time.monotonic()
        while self.waiting and len(items) < MAX_ITEMS:
            work, future = self.waiting[0]
            size += len(work.request)
            if items and size > MAX_BYTES:
                break
            self.waiting.popleft()
            if future.done():
                continue
            if work.deadline is not None and work.deadline <= now:
                future.set_exception(DeadlineExceededError("the deadline passed while the request waited to be sent"))
                continue
            items.append((work, future))
        return items


def _envelope(items: list[_Item]) -> bytes:
    now = time.monotonic()
    return inference_pb2.ExecuteRequest(
        items=[
            inference_pb2.WorkItem(
                request=work.request,
                request_hash=work.request_hash,
                timeout_us=0 if work.deadline is None else max(1, int((work.deadline - now) * 1e6)),
                traceparent=work.traceparent,
            )
            for work, _ in items
        ]
    ).SerializeToString()


def _fail(items: list[_Item], error: Exception) -> None:
    for _, future in items:
        if not future.done():
            future.set_exception(error)
