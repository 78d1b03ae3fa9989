"""A request that the local tier cannot answer, without a task or a future of its own. Most misses take this path.

Whatever calls a step of it, the caller's deadline, a worker's answer or Redis, an exception there ends the request and
the flight that others joined: `_fail` is the one way out, and gives back all that the request holds.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from cache.keys.epochs import Epochs
from cache.mesh import Computed, Flight, Found, Mesh
from cache.tiers.entry import Entry
from router.admission.quotas import Quotas
from router.balancing.catalog import ModelEntry
from router.balancing.member import Member
from router.dispatch.attempts import Answered, Asked
from router.request.call import Admitted
from services.runtime import faults
from services.runtime.errors import DeadlineExceededError, RingmeshError, UnavailableError
from services.runtime.large_result import Result
from services.runtime.rpc.rpc import Answer, Failure, failure

log = logging.getLogger(__name__)


def as_computed(call: Admitted, model: ModelEntry, epochs: Epochs, result: Result, by: Member) -> Computed:
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
        """Returns a cancel function, or None if this request needs the full path (nothing has been started then)."""
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
        self._parts.requests.in_flight += 1
        try:
            self._start(deadline)
        except Exception as error:
            self._fail(error)

    def _start(self, deadline: float | None) -> None:
        call, parts, key = self._call, self._parts, self._key
        if key:
            entry = parts.mesh.peek(key)
            if entry is not None:
                # An equal request was answered since the first look.
                self._reply(Found(entry, "hit-local"))
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
        flight = self._flight
        assert flight is not None
        try:
            entry = await self._parts.mesh.look_up(self._key, self._call.trace)
            if entry is None:
                self._compute(deadline)
            else:
                self._reply(self._parts.mesh.found(flight, entry))
        except asyncio.CancelledError:
            self._fail(UnavailableError("the router is stopping"))
            raise
        except Exception as error:
            self._fail(error)

    def _compute(self, deadline: float | None) -> None:
        call, parts = self._call, self._parts
        parts.quotas.take(call.caller)
        # By its key: what was asked for before a purge is not joined after it.
        asked = Asked(self._model, call.data, call.request_hash, self._key, deadline, call.caller, call.trace)
        dispatch = parts.dispatcher.begin(asked, self._computed)
        if self._answer is not None:
            self._dispatch = dispatch

    def cancel(self) -> None:
        """The caller has left. What is to be kept is computed all the same: others may have joined it."""
        if self._answer is None:
            return
        dispatch = self._dispatch
        self._leave()
        if self._flight is None and dispatch is not None:
            dispatch.cancel()
        self._parts.replies.left(self._call)

    def _late(self) -> None:
        self._reply(DeadlineExceededError("the deadline passed before the answer was computed"))

    def _computed(self, ended: Answered | Exception) -> None:
        try:
            if isinstance(ended, Exception):
                raise ended
            made = as_computed(self._call, self._model, self._epochs, *ended)
            if self._flight is not None:
                found = self._parts.mesh.land(self._flight, made)
            else:
                found = Found(made.entry, "bypass", made.worker)
        except Exception as error:
            self._fail(error)
        else:
            self._reply(found)

    def _fail(self, error: Exception) -> None:
        """Ends it without an answer, for the caller and for those that joined."""
        told = faults.told(log, f"{self._call.name} failed", error, self._call.trace.trace_id)
        try:
            if self._flight is not None:
                self._parts.mesh.fail(self._flight, told)
        except Exception as another:
            faults.internal(log, f"the end of {self._call.name} failed", another, self._call.trace.trace_id)
        self._reply(told)

    def _reply(self, end: Found | RingmeshError) -> None:
        """The one place where the caller is answered; nothing where that was done, or the caller has left."""
        answer = self._answer
        if answer is None:
            return
        self._leave()
        call, replies = self._call, self._parts.replies
        reply: Answer | Failure
        try:
            reply = replies.answer(call, end) if isinstance(end, Found) else replies.failure(call, end)
        except Exception as error:
            reply = failure(faults.internal(log, f"{call.name} failed", error, call.trace.trace_id))
        try:
            answer(reply)
        except Exception as error:
            faults.internal(log, "an answer could not be sent", error, call.trace.trace_id)

    def _leave(self) -> None:
        """Gives back what the caller holds."""
        self._answer = self._dispatch = None
        self._parts.requests.in_flight -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
