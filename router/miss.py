"""A request that the local tier cannot answer, done without a task or a future of its own: as most misses can be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from ringmesh.inference.v1 import inference_pb2

from cache.entry import Entry
from cache.epochs import Epochs
from cache.mesh import Computed, Flight, Found, Mesh
from router.admission.quotas import Quotas
from router.admitted import Admitted
from router.catalog import ModelEntry
from router.dispatch import Answered, Asked
from router.member import Member
from services.runtime.errors import DeadlineExceededError, RingmeshError
from services.runtime.rpc import Answer, Failure, unexpected

log = logging.getLogger(__name__)


def as_computed(
    call: Admitted, model: ModelEntry, epochs: Epochs, result: inference_pb2.WorkResult, by: Member
) -> Computed:
    """What a worker answered, as the mesh keeps it: by the purges that were when its computing began."""
    timing = result.timing
    call.provider = timing.provider
    # This request's part of the run that served it.
    entry = Entry(result.response, int(timing.compute_us // max(1, timing.batch_requests)))
    key = epochs.key(result.model_digest, model.name, call.request_hash) if call.request_hash else None
    return Computed(entry, key, by.worker_id, model.freshness)


class Cancellable(Protocol):
    """Work under way."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


class Starter(Protocol):
    """Starts a request on the fleet; Dispatcher is the real one."""

    def begin(self, asked: Asked, done: Callable[[Answered | Exception], None]) -> Cancellable:
        """`done` hears the answer and who gave it, or the error, perhaps before this returns."""


class ReplyBuilder(Protocol):
    """Makes what callers are told; Replies is the real one."""

    def answer(self, call: Admitted, found: Found) -> Answer:
        """Of a request that was answered."""

    def failure(self, call: Admitted, error: RingmeshError) -> Failure:
        """Of one that failed."""

    def left(self, call: Admitted) -> None:
        """Counts one whose caller left."""


class InFlight(Protocol):
    """Counts requests that are being answered; RequestMetrics is the real one."""

    in_flight: int


class Misses:
    """Answers requests from the fleet, and keeps what is to be kept in `mesh`."""

    def __init__(
        self, mesh: Mesh, dispatcher: Starter, quotas: Quotas, replies: ReplyBuilder, requests: InFlight
    ) -> None:
        self.mesh = mesh
        self.dispatcher = dispatcher
        self.quotas = quotas
        self.replies = replies
        self.requests = requests

    def begin(
        self, call: Admitted, deadline: float | None, answer: Callable[[Answer | Failure], None]
    ) -> Callable[[], None] | None:
        """What cancels it; None where there may be more to it: then nothing was begun."""
        model = call.model
        if call.error is not None or call.control is not None or call.place or model is None or not model.is_plain:
            return None
        epochs = self.mesh.purges.epochs
        key = b""
        if call.request_hash:
            key = epochs.key(model.digest, model.name, call.request_hash)
            if not self.mesh.may_lead(key):
                return None
        miss = _Miss(self, call, model, key, epochs, answer)
        miss.begin(deadline)
        return miss.cancel


class _Miss:
    __slots__ = (
        "_answer",
        "_call",
        "_dispatch",
        "_epochs",
        "_flight",
        "_key",
        "_looking",
        "_model",
        "_parts",
        "_timer",
    )

    def __init__(
        self,
        parts: Misses,
        call: Admitted,
        model: ModelEntry,
        key: bytes,
        epochs: Epochs,
        answer: Callable[[Answer | Failure], None],
    ) -> None:
        self._parts = parts
        self._call = call
        self._model = model
        self._key = key
        self._epochs = epochs
        self._answer: Callable[[Answer | Failure], None] | None = answer
        self._dispatch: Cancellable | None = None
        self._flight: Flight | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def begin(self, deadline: float | None) -> None:
        call, parts, key = self._call, self._parts, self._key
        parts.requests.in_flight += 1
        try:
            entry = parts.mesh.peek(key) if key else None
        except RingmeshError as error:
            self._reply(parts.replies.failure(call, error))
            return
        if key:
            if entry is not None:
                # An equal request was answered since the first look.
                self._reply(parts.replies.answer(call, Found(entry, "hit-local")))
                return
            self._flight = parts.mesh.lead(key, call.trace)
        if deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._late)
        if key and parts.mesh.shared is not None:
            self._looking = asyncio.create_task(self._look_up(deadline))
        else:
            self._compute(deadline)

    async def _look_up(self, deadline: float | None) -> None:
        """In Redis; then it is computed."""
        call, parts, flight = self._call, self._parts, self._flight
        assert flight is not None
        try:
            entry = await parts.mesh.look_up(self._key, call.trace)
        except Exception as error:
            self._computed(error)
            return
        if entry is None:
            self._compute(deadline)
            return
        found = parts.mesh.found(flight, entry)
        if self._answer is not None:
            self._reply(parts.replies.answer(call, found))

    def _compute(self, deadline: float | None) -> None:
        call, parts = self._call, self._parts
        try:
            parts.quotas.take(call.caller)
        except RingmeshError as error:
            self._computed(error)
            return
        asked = Asked(self._model, call.data, call.request_hash, call.request_hash, deadline, call.caller, call.trace)
        dispatch = parts.dispatcher.begin(asked, self._computed)
        if self._answer is not None:
            self._dispatch = dispatch

    def cancel(self) -> None:
        """The caller has left. What is to be kept is computed all the same: others may have joined it."""
        if self._answer is None:
            return
        self._parts.replies.left(self._call)
        if self._flight is None and self._dispatch is not None:
            self._dispatch.cancel()
        self._forget()

    def _late(self) -> None:
        error = DeadlineExceededError("the deadline passed before the answer was computed")
        self._reply(self._parts.replies.failure(self._call, error))

    def _computed(self, ended: Answered | Exception) -> None:
        call, parts = self._call, self._parts
        if isinstance(ended, Exception):
            if isinstance(ended, RingmeshError):
                error = ended
            else:
                log.error("trace %s: %s failed", call.trace.trace_id, call.name, exc_info=ended)
                error = unexpected(ended)
            if self._flight is not None:
                parts.mesh.fail(self._flight, error)
            if self._answer is not None:
                self._reply(parts.replies.failure(call, error))
            return
        made = as_computed(call, self._model, self._epochs, *ended)
        if self._flight is not None:
            found = parts.mesh.land(self._flight, made)
        else:
            found = Found(made.entry, "bypass", made.worker)
        if self._answer is not None:
            self._reply(parts.replies.answer(call, found))

    def _reply(self, reply: Answer | Failure) -> None:
        answer = self._answer
        self._forget()
        if answer is not None:
            answer(reply)

    def _forget(self) -> None:
        self._answer = self._dispatch = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._parts.requests.in_flight -= 1
