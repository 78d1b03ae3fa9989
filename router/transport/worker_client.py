"""The client of one worker: it sends requests in envelopes, over gRPC or a local socket, and owns the link's state.

While DEPTH envelopes for a model are under way, the requests that arrive for that model gather and leave as the next
envelope. So an idle link adds no wait, and a busy one pays for one call per envelope. Each model has a queue of its
own, so that a slow model holds up no other; at most MAX_ENVELOPES are under way on a link.

Keepalive: the fleet polls `describe`, and `is_alive` sends an HTTP/2 PING where an answer is due. A worker that stops
answering, or whose connection is lost, closes the link: all its requests end at once with an error that lets them go
to another worker, and nothing more is sent until the worker describes itself again.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2

from router.transport.channels import NETWORK, Channels
from router.transport.grpc_channel import CallError
from router.transport.worker_load import WorkerLoad
from services.runtime.errors import DeadlineExceededError, RingmeshError, from_status
from services.runtime.faults import internal
from services.runtime.large_result import LargeAnswer, Result
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# One envelope at work on the worker, one on the way: it never waits for us.
DEPTH = 2
MAX_ITEMS = 64
# gRPC servers and proxies allow at least 100 streams of a connection.
MAX_ENVELOPES = 96
# Of a model whose requests have an envelope each; the rest is for others.
DEPTH_ALONE = 48
MAX_BYTES = 4 << 20
_WITHDRAW_SECONDS = 1.0
# A worker that owes an answer and is not heard for _SILENT_SECONDS is pinged, twice at most, for the first may time out
# where our own loop was held up. With the fleet's tick, a worker that has stopped is given up within 2 s.
_SILENT_SECONDS = 0.5
_PING_SECONDS = 0.5

_EXECUTE = "/ringmesh.inference.v1.InferenceWorkerService/Execute"
_WITHDRAW = "/ringmesh.inference.v1.InferenceWorkerService/Withdraw"
_DESCRIBE = "/ringmesh.inference.v1.InferenceWorkerService/Describe"


class WorkerUnreachableError(Exception):
    """The transport to a worker failed, or it is leaving: another may answer. The message says how."""


class WorkerBusyError(WorkerUnreachableError):
    """It does not answer in time, but its engine does: it is alive and has something else to do."""


class LinkClosedError(WorkerUnreachableError):
    """The link was closed with the request under way: the worker has stopped answering."""


class WorkerLostError(LinkClosedError):
    """It was lost with the request under way, which may be what ended it."""


class NotSentError(LinkClosedError):
    """The link was closed, and the request had not left."""


class Work:
    """One request on its way. `deadline` is in time.monotonic.

    An envelope is answered when all in it are. `is_alone`: it leaves in an envelope of its own, since its answer may
    come before those of others that are sent with it.
    """

    __slots__ = ("deadline", "is_alone", "request", "request_hash", "traceparent")

    def __init__(
        self,
        request: bytes,
        request_hash: bytes,
        deadline: float | None,
        traceparent: str,
        *,
        is_alone: bool = False,
    ) -> None:
        self.request = request
        self.request_hash = request_hash
        self.deadline = deadline
        self.traceparent = traceparent
        self.is_alone = is_alone


# A RingmeshError is of our own making: its time was up, or it could not be sent.
Outcome: TypeAlias = "Result | WorkerUnreachableError | RingmeshError"


class Sent:
    """A request given to a link, until `done` has heard what became of it."""

    __slots__ = ("done", "left", "work")

    def __init__(self, work: Work, done: Callable[[Outcome], None]) -> None:
        self.work = work
        self.done: Callable[[Outcome], None] | None = done
        # In an envelope.
        self.left = False


class WorkerClient:
    """A link to the worker at `address`, with a queue for each model.

    On our own host envelopes go over the worker's Unix socket while there is one.
    """

    def __init__(self, address: str, load: WorkerLoad, channels: Channels = NETWORK) -> None:
        self.address = address
        self._load = load
        # Requests in the envelopes under way.
        self._under_way = 0
        self._channel = channels.channel(address)
        self._local = channels.local()
        self._queues: dict[bytes, _ModelQueue] = {}
        # Queues that wait until fewer than MAX_ENVELOPES are under way.
        self._blocked: deque[_ModelQueue] = deque()
        # What cancels each envelope under way.
        self._envelopes: dict[_Envelope, Callable[[], object]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        # Trace contexts of what was sent and nobody waits for any more.
        self._unwanted: list[str] = []
        # Why nothing is sent; "" while the link is open.
        self._closed = ""
        # When the worker was last heard, or an envelope left that it may answer.
        self._heard = 0.0
        self._is_pinging = False
        # Requests that a closed link gives back, and what each is told.
        self._leaving: deque[tuple[Sent, WorkerUnreachableError]] = deque()

    def send(self, model_digest: bytes, work: Work, done: Callable[[Outcome], None]) -> Sent:
        """Runs it there; `done` hears the worker's result, success or failure, or why there is none."""
        sent = Sent(work, done)
        self._load.sent()
        if self._closed:
            self._give_back([sent], NotSentError(self._closed))
            return sent
        queue = self._queues.get(model_digest)
        if queue is None:
            queue = self._queues[model_digest] = _ModelQueue()
        queue.waiting.append(sent)
        if not queue.sending:
            # After all that this turn of the loop brings: what callers sent together leaves together.
            queue.sending = True
            asyncio.get_running_loop().call_soon(self._send, queue)
        return sent

    def withdraw(self, sent: Sent) -> None:
        """Nobody waits for it any more: what the worker has not begun by now, it does not run."""
        if sent.done is None:
            return
        sent.done = None
        self._load.ended()
        if sent.left:
            if not self._unwanted:
                # Of many that are withdrawn together, one call tells.
                asyncio.get_running_loop().call_soon(self._tell_unwanted)
            self._unwanted.append(sent.work.traceparent)

    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse:
        """What the worker holds, without models where that is `known_version`; it is known within `seconds`.

        An answer opens the link. Raises WorkerBusyError where the worker only shows that it is alive, else
        WorkerUnreachableError.
        """
        request = inference_pb2.DescribeRequest(known_version=known_version).SerializeToString()
        try:
            response = inference_pb2.DescribeResponse.FromString(await self._timed(_DESCRIBE, request, seconds / 2))
            self._load.reported(response.load, self._under_way)
            if response.envelope_socket and self._channel.is_local(response.port):
                await self._local.use(response.envelope_socket)
            self._closed = ""
            return response
        except CallError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED and await self._channel.ping(seconds / 2):
                raise WorkerBusyError(str(error)) from None
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

    @property
    def is_silent(self) -> bool:
        """Whether an answer is due and nothing was heard for so long that `is_alive` should be asked."""
        return bool(self._envelopes) and not self._is_pinging and time.monotonic() - self._heard > _SILENT_SECONDS

    async def is_alive(self) -> bool:
        """Whether the worker's engine answers a ping, however busy the worker is."""
        self._is_pinging = True
        try:
            return await self._channel.ping(_PING_SECONDS) or await self._channel.ping(_PING_SECONDS)
        finally:
            self._is_pinging = False
            self._heard = time.monotonic()

    def give_up(self) -> None:
        """Closes the link: the worker stopped answering."""
        self._close(LinkClosedError("it stopped answering"))

    def _close(self, error: LinkClosedError) -> None:
        """Disconnects; gives back requests under way with `error`, then those that have not left with NotSentError."""
        self._closed = str(error)
        envelopes, self._envelopes = self._envelopes, {}
        self._under_way = 0
        for cancel in envelopes.values():
            cancel()
        # What the worker has not read so far it would read for nobody.
        self._local.drop()
        self._channel.drop()
        for envelope in envelopes:
            envelope.queue.under_way = 0
            self._give_back(envelope.items, error)
        for queue in self._queues.values():
            self._give_back(queue.waiting, NotSentError(self._closed))
            queue.waiting.clear()
            queue.blocked = False
        self._blocked.clear()

    def _give_back(self, requests: Iterable[Sent], error: WorkerUnreachableError) -> None:
        if not self._leaving:
            asyncio.get_running_loop().call_soon(self._end_leaving)
        self._leaving.extend([(sent, error) for sent in requests])

    def _end_leaving(self) -> None:
        """At most MAX_ITEMS in each turn of the loop, so that a long queue does not block it."""
        for _ in range(min(MAX_ITEMS, len(self._leaving))):
            self._end(*self._leaving.popleft())
        if self._leaving:
            asyncio.get_running_loop().call_soon(self._end_leaving)

    def forget_queues(self, model_digests: frozenset[bytes]) -> None:
        """Drops the idle queues of models that the worker no longer holds."""
        for digest in [d for d, queue in self._queues.items() if d not in model_digests and not queue.busy]:
            del self._queues[digest]

    async def close(self) -> None:
        """Ends what is under way and disconnects."""
        self._close(LinkClosedError("this router has closed the link"))
        self._local.close()
        await self._channel.close()

    def _tell_unwanted(self) -> None:
        request = inference_pb2.WithdrawRequest(traceparents=self._unwanted)
        self._unwanted = []
        telling = BACKGROUND.once("withdrawal", self._tell(request.SerializeToString()))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell(self, withdraw: bytes) -> None:
        with suppress(CallError):  # then it runs in vain
            await self._timed(_WITHDRAW, withdraw, _WITHDRAW_SECONDS)

    def _send(self, queue: _ModelQueue) -> None:
        queue.sending = False
        while queue.waiting and queue.under_way < (DEPTH_ALONE if queue.waiting[0].work.is_alone else DEPTH):
            if len(self._envelopes) >= MAX_ENVELOPES:
                if not queue.blocked:
                    queue.blocked = True
                    self._blocked.append(queue)
                return
            if not (items := self._next_envelope(queue)):
                return
            envelope = _Envelope(queue, items)
            try:
                cancel = self._begin(envelope)
            except Exception as error:
                failed = internal(log, "an envelope could not be sent", error)
                for sent in items:
                    self._end(sent, failed)
                continue
            if not self._envelopes:
                self._heard = time.monotonic()
            self._envelopes[envelope] = cancel
            queue.under_way += 1
            self._under_way += len(items)

    def _begin(self, envelope: _Envelope) -> Callable[[], object]:
        answered = partial(self._answered, envelope)
        request, local = envelope.request(), self._local.connection()
        if local is not None:
            return local.begin(request, answered)
        return self._channel.begin(_EXECUTE, request, answered)

    def _next_envelope(self, queue: _ModelQueue) -> list[Sent]:
        """What leaves now: one item, then as many as fit; without those whose caller has gone or is late."""
        items: list[Sent] = []
        size = 0
        now = time.monotonic()
        waiting = queue.waiting
        while waiting and len(items) < MAX_ITEMS:
            sent = waiting[0]
            work = sent.work
            size += len(work.request)
            if items and (size > MAX_BYTES or work.is_alone):
                break
            waiting.popleft()
            if sent.done is None:
                continue
            if work.deadline is not None and work.deadline <= now:
                self._end(sent, DeadlineExceededError("the deadline passed while the request waited to be sent"))
                continue
            sent.left = True
            items.append(sent)
        return items

    def _answered(self, envelope: _Envelope, answer: bytes | LargeAnswer | CallError) -> None:
        if envelope not in self._envelopes:
            return
        self._heard = time.monotonic()
        if isinstance(answer, CallError) and answer.lost:
            # All that is under way may be what ended it.
            self._close(WorkerLostError(str(answer)))
            return
        if isinstance(answer, CallError) and answer.unsent:
            self._close(NotSentError(str(answer)))
            return
        del self._envelopes[envelope]
        queue, items = envelope.queue, envelope.items
        queue.under_way -= 1
        self._under_way -= len(items)
        outcomes = self._outcomes(answer, len(items))
        # Before they are told: the next one is on its way while they are.
        self._send(queue)
        while self._blocked and len(self._envelopes) < MAX_ENVELOPES:
            blocked = self._blocked.popleft()
            blocked.blocked = False
            self._send(blocked)
        for sent, outcome in zip(items, outcomes, strict=True):
            self._end(sent, outcome)

    def _outcomes(self, answer: bytes | LargeAnswer | CallError, items: int) -> Sequence[Outcome]:
        if isinstance(answer, CallError):
            return [WorkerUnreachableError(str(answer))] * items
        try:
            serialized = answer.message if isinstance(answer, LargeAnswer) else answer
            response = inference_pb2.ExecuteResponse.FromString(serialized)
        except DecodeError as error:
            return [WorkerUnreachableError(f"it answered with something else than an envelope: {error!r}")] * items
        if len(response.results) != items:
            told = f"it answered {len(response.results)} of {items} requests"
            return [WorkerUnreachableError(told)] * items
        self._load.reported(response.load, self._under_way)
        return answer.results(response) if isinstance(answer, LargeAnswer) else response.results

    def _end(self, sent: Sent, outcome: Outcome) -> None:
        done, sent.done = sent.done, None
        if done is None:
            return
        self._load.ended()
        try:
            done(outcome)
        except Exception as error:
            # The others of its envelope have answers too.
            internal(log, "what became of a request could not be told", error)


class _ModelQueue:
    """What waits for one model on one worker."""

    __slots__ = ("blocked", "sending", "under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Sent] = deque()
        self.under_way = 0
        self.sending = False
        # In `_blocked` of its link.
        self.blocked = False

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.under_way)


class _Envelope:
    """Requests that leave together."""

    __slots__ = ("items", "queue")

    def __init__(self, queue: _ModelQueue, items: Sequence[Sent]) -> None:
        self.queue = queue
        self.items = items

    def request(self) -> bytes:
        now = time.monotonic()
        return inference_pb2.ExecuteRequest(
            items=[
                inference_pb2.WorkItem(
                    request=work.request,
                    request_hash=work.request_hash,
                    timeout_us=0 if work.deadline is None else max(1, int((work.deadline - now) * 1e6)),
                    traceparent=work.traceparent,
                )
                for work in [sent.work for sent in self.items]
            ]
        ).SerializeToString()
