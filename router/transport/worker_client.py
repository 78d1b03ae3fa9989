"""The client of one worker: it sends requests in envelopes, over gRPC or a local socket, and owns the link's state.

While DEPTH envelopes for a model are under way, new requests for that model gather and leave as the next envelope. So
an idle link adds no wait, and a busy link makes one call per envelope. Each model has its own queue, so a slow model
does not delay others. At most MAX_ENVELOPES are under way on a link.

Keepalive: the fleet polls `describe`, and `is_alive` sends an HTTP/2 PING if an answer is due. The link closes if the
worker stops answering or the connection is lost. All its requests then end with an error that allows a retry at another
worker, and nothing is sent until the worker describes itself again.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2

from router.transport.grpc_channel import CallError, GrpcChannel
from router.transport.local_channel import LocalChannel
from router.transport.worker_load import WorkerLoad
from services.runtime import wire
from services.runtime.errors import DeadlineExceededError, RingmeshError, from_status
from services.runtime.faults import internal
from services.runtime.large_result import LargeAnswer, Result
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# Envelopes per model: one that the worker runs and one on its way, so the worker never waits for the router.
DEPTH = 2
MAX_ITEMS = 64
# gRPC servers and proxies allow at least 100 streams per connection.
MAX_ENVELOPES = 96
# Envelopes of a model whose requests each have their own envelope; the others are left for other models.
DEPTH_ALONE = 48
MAX_BYTES = 4 << 20
_WITHDRAW_SECONDS = 1.0
# Longer requests are not copied into a joined piece of an envelope.
_MOST_JOINED = 16 << 10
# If an answer is due and nothing was received for _SILENT_SECONDS, the worker is pinged, at most twice: the first ping
# may time out because the router's loop was blocked. With the fleet's tick, a stopped worker is given up within 2 s.
_SILENT_SECONDS = 0.5
_PING_SECONDS = 0.5

_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
_EXECUTE = "/ringmesh.inference.v1.InferenceWorkerService/Execute"
_WITHDRAW = "/ringmesh.inference.v1.InferenceWorkerService/Withdraw"
_DESCRIBE = "/ringmesh.inference.v1.InferenceWorkerService/Describe"


class WorkerUnreachableError(Exception):
    """The transport to a worker failed, or the worker is leaving: another may answer. The message has details."""


class WorkerBusyError(WorkerUnreachableError):
    """The worker does not answer in time, but its engine answers a ping: it is alive but busy."""


class LinkClosedError(WorkerUnreachableError):
    """The link was closed while the request was under way: the worker stopped answering."""


class WorkerLostError(LinkClosedError):
    """The worker was lost while the request was under way; the request may be the cause."""


class NotSentError(LinkClosedError):
    """The link was closed before the request was sent."""


# A RingmeshError comes from the router itself: the deadline passed, or the request could not be sent.
ItemOutcome: TypeAlias = "Result | WorkerUnreachableError | RingmeshError"


class EnvelopeItem:
    """One request to send. `deadline` in time.monotonic.

    An envelope is answered when all its requests are. `is_alone`: the request gets its own envelope, because its answer
    may come earlier than those of requests sent with it. `done` is called with the worker's result (success or failure)
    or an error, and is None after that or after a withdrawal.
    """

    def __init__(
        self,
        request: bytes,
        request_hash: bytes,
        deadline: float | None,
        traceparent: str,
        done: Callable[[ItemOutcome], None],
        *,
        is_alone: bool = False,
    ) -> None:
        self.request = request
        self.request_hash = request_hash
        self.deadline = deadline
        self.traceparent = traceparent
        self.done: Callable[[ItemOutcome], None] | None = done
        self.is_alone = is_alone
        # Whether it left in an envelope.
        self.left = False


class _Channel(Protocol):
    """GrpcChannel, or the network of a simulation."""

    def begin(
        self, method: str, request: bytes, done: Callable[[bytes | LargeAnswer | CallError], None]
    ) -> Callable[[], object]: ...
    async def call(self, method: str, request: bytes) -> bytes: ...
    def is_local(self, port: int) -> bool: ...
    async def ping(self, seconds: float) -> bool: ...
    def drop(self) -> None: ...


# Opens the channel to a worker at host:port.
OpenChannel: TypeAlias = Callable[[str], _Channel]


class WorkerClient:
    """A link to the worker at `address`, with a queue for each model.

    If the worker is on this host, envelopes go over its Unix socket while that is connected.
    """

    def __init__(self, address: str, load: WorkerLoad, open_channel: OpenChannel = GrpcChannel) -> None:
        self.address = address
        self._load = load
        # Requests in the envelopes under way.
        self._under_way = 0
        self._channel = open_channel(address)
        self._local = LocalChannel()
        self._queues: dict[bytes, _ModelQueue] = {}
        # Queues that wait until fewer than MAX_ENVELOPES are under way.
        self._blocked: deque[_ModelQueue] = deque()
        # The cancel function of each envelope under way.
        self._envelopes: dict[_SentEnvelope, Callable[[], object]] = {}
        # Trace contexts of requests that were sent and then withdrawn, to be reported to the worker.
        self._withdrawn: list[str] = []
        # Why nothing is sent; "" while the link is open.
        self._closed = ""
        # Time of the last answer or ping, or when an envelope left an idle link.
        self._heard = 0.0
        self._is_pinging = False
        # Requests that a closed link gives back, each with its error.
        self._leaving: deque[tuple[EnvelopeItem, WorkerUnreachableError]] = deque()

    def send(self, model_digest: bytes, item: EnvelopeItem) -> None:
        self._load.sent()
        if self._closed:
            self._give_back([item], NotSentError(self._closed))
            return
        queue = self._queues.get(model_digest)
        if queue is None:
            queue = self._queues[model_digest] = _ModelQueue()
        queue.waiting.append(item)
        if not queue.sending:
            # Sends at the end of this turn of the loop, so that requests that arrive together leave together.
            queue.sending = True
            asyncio.get_running_loop().call_soon(self._send, queue)

    def withdraw(self, item: EnvelopeItem) -> None:
        """Withdraws a request: `done` is not called, and the worker does not run it if it has not started."""
        if item.done is None:
            return
        item.done = None
        self._load.ended()
        if item.left:
            if not self._withdrawn:
                # One call reports all requests that are withdrawn together.
                asyncio.get_running_loop().call_soon(self._report_withdrawn)
            self._withdrawn.append(item.traceparent)

    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse:
        """The worker's description, without models if they are still `known_version`. Takes at most `seconds`.

        An answer opens the link. Raises WorkerBusyError if the worker only answers a ping, else WorkerUnreachableError.
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
            raise WorkerUnreachableError("its answer is not the description of a worker") from None

    async def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """Calls another method. Raises the worker's own error, or WorkerUnreachableError."""
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
        """Whether an answer is due and nothing was received for _SILENT_SECONDS; `is_alive` should then be called."""
        return bool(self._envelopes) and not self._is_pinging and time.monotonic() - self._heard > _SILENT_SECONDS

    async def is_alive(self) -> bool:
        """Whether the worker's engine answers a ping."""
        self._is_pinging = True
        try:
            return await self._channel.ping(_PING_SECONDS) or await self._channel.ping(_PING_SECONDS)
        finally:
            self._is_pinging = False
            self._heard = time.monotonic()

    def give_up(self) -> None:
        self._close(LinkClosedError("it stopped answering"))

    def _close(self, error: LinkClosedError) -> None:
        """Disconnects; gives back requests under way with `error`, then those that have not left with NotSentError."""
        self._closed = str(error)
        envelopes, self._envelopes = self._envelopes, {}
        self._under_way = 0
        for cancel in envelopes.values():
            cancel()
        # Disconnects, so that the worker does not read the unread rest.
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

    def _give_back(self, items: Iterable[EnvelopeItem], error: WorkerUnreachableError) -> None:
        if not self._leaving:
            asyncio.get_running_loop().call_soon(self._end_leaving)
        self._leaving.extend([(item, error) for item in items])

    def _end_leaving(self) -> None:
        """Ends at most MAX_ITEMS requests in each turn of the loop, so that a long queue does not block it."""
        for _ in range(min(MAX_ITEMS, len(self._leaving))):
            self._end(*self._leaving.popleft())
        if self._leaving:
            asyncio.get_running_loop().call_soon(self._end_leaving)

    def forget_queues(self, model_digests: frozenset[bytes]) -> None:
        for digest in [d for d, queue in self._queues.items() if d not in model_digests and not queue.busy]:
            del self._queues[digest]

    def close(self) -> None:
        self._close(LinkClosedError("this router has closed the link"))
        self._local.close()

    def _report_withdrawn(self) -> None:
        request = inference_pb2.WithdrawRequest(traceparents=self._withdrawn).SerializeToString()
        self._withdrawn = []

        async def report() -> None:
            with suppress(CallError):  # if this fails, the worker runs the withdrawn requests in vain
                await self._timed(_WITHDRAW, request, _WITHDRAW_SECONDS)

        BACKGROUND.once("withdrawal", report)

    def _send(self, queue: _ModelQueue) -> None:
        queue.sending = False
        while queue.waiting and queue.under_way < (DEPTH_ALONE if queue.waiting[0].is_alone else DEPTH):
            if len(self._envelopes) >= MAX_ENVELOPES:
                if not queue.blocked:
                    queue.blocked = True
                    self._blocked.append(queue)
                return
            if not (items := self._next_envelope(queue)):
                return
            envelope = _SentEnvelope(queue, items)
            try:
                cancel = self._begin(envelope)
            except Exception as error:
                failed = internal(log, "an envelope could not be sent", error)
                for item in items:
                    self._end(item, failed)
                continue
            if not self._envelopes:
                self._heard = time.monotonic()
            self._envelopes[envelope] = cancel
            queue.under_way += 1
            self._under_way += len(items)

    def _begin(self, envelope: _SentEnvelope) -> Callable[[], object]:
        answered = partial(self._answered, envelope)
        request, local = envelope.request(), self._local.connection()
        if local is not None:
            return local.begin(request, answered)
        return self._channel.begin(_EXECUTE, b"".join(request), answered)

    def _next_envelope(self, queue: _ModelQueue) -> list[EnvelopeItem]:
        """The items of the next envelope: one, then as many as fit. Drops requests that are withdrawn or late."""
        items: list[EnvelopeItem] = []
        size = 0
        now = time.monotonic()
        waiting = queue.waiting
        while waiting and len(items) < MAX_ITEMS:
            item = waiting[0]
            size += len(item.request)
            if items and (size > MAX_BYTES or item.is_alone or items[0].is_alone):
                break
            waiting.popleft()
            if item.done is None:
                continue
            if item.deadline is not None and item.deadline <= now:
                self._end(item, DeadlineExceededError("the deadline passed while the request waited to be sent"))
                continue
            item.left = True
            items.append(item)
        return items

    def _answered(self, envelope: _SentEnvelope, answer: bytes | LargeAnswer | CallError) -> None:
        if envelope not in self._envelopes:
            return
        self._heard = time.monotonic()
        if isinstance(answer, CallError) and answer.lost:
            # Any request under way may be the cause.
            self._close(WorkerLostError(str(answer)))
            return
        if isinstance(answer, CallError) and answer.unsent:
            self._close(NotSentError(str(answer)))
            return
        del self._envelopes[envelope]
        queue, items = envelope.queue, envelope.items
        queue.under_way -= 1
        self._under_way -= len(items)
        if len(items) > 1 and isinstance(answer, CallError) and answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Together they are too large for this worker; alone, perhaps one of them is.
            for item in items:
                item.is_alone, item.left = True, False
            queue.waiting.extendleft(reversed(items))
            items = []
        outcomes = self._outcomes(answer, len(items))
        # Sends the next envelope before it reports these outcomes.
        self._send(queue)
        while self._blocked and len(self._envelopes) < MAX_ENVELOPES:
            blocked = self._blocked.popleft()
            blocked.blocked = False
            self._send(blocked)
        for item, outcome in zip(items, outcomes, strict=True):
            self._end(item, outcome)

    def _outcomes(self, answer: bytes | LargeAnswer | CallError, items: int) -> Sequence[ItemOutcome]:
        if isinstance(answer, CallError):
            if answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                # The request is too large for this worker; another may take larger ones.
                failure = inference_pb2.Failure(code=_EXHAUSTED, message=answer.details, kind="too_large")
                return [inference_pb2.WorkResult(failure=failure)] * items
            return [WorkerUnreachableError(str(answer))] * items
        try:
            serialized = answer.message if isinstance(answer, LargeAnswer) else answer
            response = inference_pb2.ExecuteResponse.FromString(serialized)
        except DecodeError as error:
            return [WorkerUnreachableError(f"its answer is not an ExecuteResponse: {error!r}")] * items
        if len(response.results) != items:
            return [WorkerUnreachableError(f"it answered {len(response.results)} of {items} requests")] * items
        self._load.reported(response.load, self._under_way)
        return answer.results(response) if isinstance(answer, LargeAnswer) else response.results

    def _end(self, item: EnvelopeItem, outcome: ItemOutcome) -> None:
        done, item.done = item.done, None
        if done is None:
            return
        self._load.ended()
        try:
            done(outcome)
        except Exception as error:
            # An error in `done` must not affect the other requests of the envelope.
            internal(log, "the outcome of a request could not be delivered", error)


class _ModelQueue:
    """The queue of requests for one model on one worker."""

    def __init__(self) -> None:
        self.waiting: deque[EnvelopeItem] = deque()
        self.under_way = 0
        self.sending = False
        # Whether the queue is in `_blocked` of its link.
        self.blocked = False

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.under_way)


class _SentEnvelope:
    """Requests that are sent together."""

    def __init__(self, queue: _ModelQueue, items: Sequence[EnvelopeItem]) -> None:
        self.queue = queue
        self.items = items

    def request(self) -> list[bytes]:
        """The serialized ExecuteRequest, in pieces: through messages, each request would be copied twice."""
        now = time.monotonic()
        pieces: list[bytes] = []
        parts: list[bytes] = []
        for item in self.items:
            head = wire.head(1, len(item.request))
            rest = wire.field(2, item.request_hash) + wire.field(4, item.traceparent.encode())
            if item.deadline is not None:
                rest += b"\x18" + wire.varint(max(1, int((item.deadline - now) * 1e6)))
            parts += wire.head(1, len(head) + len(item.request) + len(rest)), head
            if len(item.request) > _MOST_JOINED:
                pieces += b"".join(parts), item.request
                parts = [rest]
            else:
                parts += item.request, rest
        pieces.append(b"".join(parts))
        return pieces
