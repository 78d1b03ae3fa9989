"""Runs the requests of an envelope concurrently; each request has its own result."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from services.inference.work_results import failed
from services.runtime.driver import Driver, Promise
from services.runtime.errors import ResourceExhaustedError, UnavailableError
from services.runtime.large_result import SplitResult

# All responses of an envelope share one message, which protobuf limits to 2 GiB.
MAX_ENVELOPE_BYTES = (2 << 30) - (64 << 20)


class Work:
    """A serialized request. `deadline`: in time.monotonic. `trace_context`: the router's span for it, as w3c.packed."""

    def __init__(self, data: bytes, request_hash: bytes, deadline: float | None, trace_context: bytes) -> None:
        self.data = data
        self.request_hash = request_hash
        self.deadline = deadline
        self.trace_context = trace_context


async def run_all(requests: Sequence[Coroutine[Any, Any, SplitResult]]) -> list[SplitResult]:
    """Drives the requests on the event loop and returns their results in order. If cancelled, it cancels all of them.

    Responses that no longer fit into the envelope become failures.
    """
    envelope = _Envelope(len(requests))
    drivers = [Driver(request, partial(envelope.ended, index)) for index, request in enumerate(requests)]
    try:
        for driver in drivers:
            driver.start()
        if drivers:
            await envelope.all_ended
    finally:
        if envelope.left:
            for driver in drivers:
                driver.cancel()
    return envelope.bounded()


class _Envelope:
    def __init__(self, size: int) -> None:
        self.left = size
        self.all_ended: Promise[None] = Promise()
        self._outcomes: list[SplitResult | BaseException | None] = [None] * size
        self._start = time.monotonic_ns()

    def ended(self, index: int, outcome: SplitResult | BaseException) -> None:
        self._outcomes[index] = outcome
        self.left -= 1
        if not self.left:
            self.all_ended.settle(None)

    def bounded(self) -> list[SplitResult]:
        results: list[SplitResult] = []
        room = MAX_ENVELOPE_BYTES
        for outcome in self._outcomes:
            if outcome is None or isinstance(outcome, BaseException):
                outcome = failed(UnavailableError("the worker is stopping"), self._start)
            elif len(outcome.response) > room:
                error = ResourceExhaustedError("too much was answered at once; retry later", kind="too_large")
                outcome = failed(error, self._start)
            room -= len(outcome.response)
            results.append(outcome)
        return results
