"""Dynamic batching: requests that wait while a batch runs form the next batch."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.codec.request import Decoded
from services.inference.execution.inline_runs import InlineRuns
from services.inference.execution.model import OnnxModel
from services.inference.repository.crash_journal import UNWATCHED, Watch
from services.inference.scheduling.request_queue import QueuedRequest, RequestQueue
from services.inference.scheduling.returning_callers import ReturningCallers
from services.runtime.apportioned import apportioned
from services.runtime.errors import DeadlineExceededError, InternalError, UnavailableError

MAX_MEMBERS = 16
# If batches cost more per row than single runs, an instance takes requests for up to this time and runs each alone.
APART_NS = 25_000_000
# One turn in PROBE uses the slower way, so that its measurement stays current.
PROBE = 32
# If running apart takes at least this many times as long, only one turn in PROBE times PROBE runs apart.
_NEAR = 1.5
# Key of turns that ran apart, in place of the bit length of a run's rows.
_APART_BITS = -1
_MAX_KINDS = 1024
# Weights of a faster and of a slower run in the average. A slow run says little: another process may have delayed it.
_FASTER, _SLOWER = 0.3, 0.05
_AS_THEY_COME = config_pb2.ModelDynamicBatching()


class BatchResult:
    """Outputs in the requested order, and the run that made them. Times are of time.monotonic_ns."""

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        queued_ns: int,
        start_ns: int,
        run_ns: int,
        end_ns: int,
        batch_requests: int,
        batch_rows: int,
        first: bool,
        share_us: int,
        members: bytes = b"",
        steps: Sequence[StepResult] = (),
    ) -> None:
        self.arrays = arrays
        self.queued_ns = queued_ns
        self.start_ns = start_ns
        self.run_ns = run_ns
        self.end_ns = end_ns
        self.batch_requests = batch_requests
        self.batch_rows = batch_rows
        # Whether it is the first result of its batch. The run is counted with the first result.
        self.first = first
        # This request's share of the time from `start_ns` to `end_ns`.
        self.share_us = share_us
        # The concatenated trace contexts of the first MAX_MEMBERS requests of the batch.
        self.members = members
        # The steps of an ensemble.
        self.steps = steps


class StepResult(NamedTuple):
    """The run of one step of an ensemble. `begun_ns` and `ended_ns` are of time.monotonic_ns."""

    model: OnnxModel
    begun_ns: int
    ended_ns: int
    batch: BatchResult


class Batcher:
    """Runs requests for one model, `instances` batches at a time.

    A free instance takes the first request in the queue and the waiting requests with its signature, up to the model's
    `max_batch_rows`; a larger request runs alone. An idle model runs a request immediately, unless `batching` lets the
    first request wait for a batch of a preferred size, or of the largest. After a batch of several requests, the next
    batch waits for the callers of that batch to return. If batches prove to cost more per row than single runs, which
    happens on CPUs, the requests that an instance takes run one after the other.

    All methods must be called on the event loop.
    """

    def __init__(
        self,
        model: OnnxModel,
        executor: Executor,
        *,
        instances: int = 1,
        batching: config_pb2.ModelDynamicBatching = _AS_THEY_COME,
        watch: Watch = UNWATCHED,
        inline: InlineRuns | None = None,
    ) -> None:
        """`inline`: None if no run may be made on the event loop."""
        self._model = model
        self._inline_runs = inline
        self._watch = watch
        self._executor = executor
        self._free = instances
        self._max_delay_ns = batching.max_queue_delay_microseconds * 1000
        self._preferred = sorted(batching.preferred_batch_size)
        self._timer: asyncio.TimerHandle | None = None
        self._returning = ReturningCallers()
        self._queue = RequestQueue(model.name, batching)
        self._batches: set[asyncio.Task[None]] = set()
        self._dispatching = False
        # Recent average time of a row in ns, by signature and the bit length of the run's number of rows.
        self._row_ns: dict[tuple[Hashable, int], float] = {}
        self._turns = 0
        self._closed = False

    async def submit(self, decoded: Decoded, deadline: float | None) -> BatchResult:
        """Runs a request in a batch. If cancelled while it waits, the request does not run.

        Raises DeadlineExceededError if the deadline passes before it runs, and ResourceExhaustedError if the queue is
        full.
        """
        waiting = self.enqueue(decoded, deadline)
        try:
            result: BatchResult = await waiting.future
        except asyncio.CancelledError:
            self.leave(waiting)
            raise
        return result

    def enqueue(self, decoded: Decoded, deadline: float | None) -> QueuedRequest:
        """As `submit`, but does not wait: the future of the returned object gets the result."""
        loop = asyncio.get_running_loop()
        waiting = QueuedRequest(decoded, deadline, loop.create_future())
        self._queue.push(waiting)
        if not self._dispatching:
            # Dispatches after the other callbacks of this turn of the loop, so that the requests of an envelope share a
            # run.
            self._dispatching = True
            loop.call_soon(self._dispatch)
        return waiting

    def leave(self, waiting: QueuedRequest) -> None:
        """Cancels a request. If it has not begun to run, it does not run."""
        waiting.future.cancel()
        self._queue.cancelled(waiting)

    def withdraw(self, waiting: QueuedRequest) -> bool:
        """Cancels a request and its future if it has not begun to run; returns whether it was cancelled."""
        if waiting.begun or waiting.future.done():
            return False
        self.leave(waiting)
        return True

    def run_at_once(self, requests: Sequence[Decoded]) -> list[BatchResult | Exception] | None:
        """Runs `requests` in one run on the event loop. None if others wait or the run may be slow."""
        first = requests[0]
        inline = self._inline_runs
        if inline is None or self._queue or not self._free or self._max_delay_ns or self._watch.suspect or self._closed:
            return None
        rows = 0
        for decoded in requests:
            if decoded.signature != first.signature:
                return None
            rows += decoded.rows
        if not inline.allows(first, rows):
            return None
        if len(requests) > 1 and not (self._model.batchable and rows <= self._model.max_batch_rows):
            return None
        now = time.monotonic_ns()
        return self._run(requests, [now] * len(requests))

    @property
    def is_quick(self) -> bool:
        return self._inline_runs is not None and self._inline_runs.is_quick

    @property
    def waiting(self) -> int:
        return sum(not waiting.future.done() for waiting in self._queue)

    async def close(self) -> None:
        """Returns when the requests that wait have run; they wait for no others."""
        self._closed = True
        self._dispatch()
        while self._batches:
            await asyncio.wait(self._batches)

    def _dispatch(self) -> None:
        self._dispatching = False
        while self._free and (first := next(iter(self._queue), None)) is not None:
            rows = self._rows()
            limit = self._limit(rows)
            self._turns += 1
            row_ns = self._apart_ns(first.decoded, min(rows, limit))
            if row_ns:
                # Leaves half of the rows, so that no instance idles while the earlier requests are answered.
                limit = max(1, min(-(-rows // max(2, self._free)), int(APART_NS / row_ns)))
            elif self._waits_for_more(first, rows):
                break
            batch = self._next_batch(limit)
            if not batch:
                break
            self._free -= 1
            if not row_ns:
                self._queue.began(batch)
            task = asyncio.create_task(self._serve(batch, apart=row_ns > 0))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    def _apart_ns(self, first: Decoded, rows: int) -> float:
        """The expected time of a row in ns if `rows` are to run one after the other; 0 if they are to run together."""
        signature, smallest = first.signature, first.rows.bit_length()
        known = [self._row_ns.get((signature, bits)) for bits in range(rows.bit_length(), smallest, -1)]
        together = next((row_ns for row_ns in known if row_ns is not None), 0.0)
        apart = self._row_ns.get((signature, _APART_BITS), 0.0)
        # Before the first such turn, the time of a single request says whether to try one.
        expected = apart or self._row_ns.get((signature, smallest), 0.0)
        if not together:
            return 0.0
        if not expected:
            return APART_NS  # one request alone, to measure it
        near = expected < _NEAR * together
        if not apart and near:
            return expected
        runs_apart = 0 < apart < together
        if self._turns % (PROBE if near else PROBE * PROBE) == 0:
            runs_apart = not runs_apart
        return expected if runs_apart else 0.0

    def _waits_for_more(self, first: QueuedRequest, rows: int) -> bool:
        """Whether the first request may still wait, with `rows` in the queue. If so, a timer dispatches again."""
        until = self._returning.wait_until(rows)
        if rows < (self._preferred[0] if self._preferred else self._model.max_batch_rows):
            until = max(until, first.queued_ns + self._max_delay_ns)
        now = time.monotonic_ns()
        if until <= now or self._closed:
            self._returning.began(rows)
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later((until - now) / 1e9, self._dispatch)
        return True

    def _limit(self, rows: int) -> int:
        """The largest preferred size that `rows` can fill; without any, an equal share per free instance."""
        if not self._preferred and self._free == 1:
            return self._model.max_batch_rows
        if not self._preferred:
            return min(self._model.max_batch_rows, -(-rows // self._free))
        return max((size for size in self._preferred if size <= rows), default=self._model.max_batch_rows)

    def _next_batch(self, limit: int) -> list[QueuedRequest]:
        now = time.monotonic()
        batch: list[QueuedRequest] = []
        left: list[QueuedRequest] = []
        rows = 0
        while waiting := self._queue.pop(now):
            decoded = waiting.decoded
            if batch and not self._model.batchable:
                left.append(waiting)
                break
            if batch and decoded.signature != batch[0].decoded.signature:
                left.append(waiting)
                continue
            if batch and rows + decoded.rows > limit:
                left.append(waiting)
                break
            batch.append(waiting)
            rows += decoded.rows
        self._queue.put_back(left)
        return batch

    async def _serve(self, batch: list[QueuedRequest], *, apart: bool) -> None:
        loop = asyncio.get_running_loop()
        # The results if the run itself is cancelled.
        results: list[BatchResult | Exception] = [UnavailableError("the worker is stopping")] * len(batch)
        try:
            async with self._watch.turn if self._watch.suspect else nullcontext():
                if apart:
                    results = await loop.run_in_executor(self._executor, self._run_apart, batch)
                else:
                    requests, queued_ns = [w.decoded for w in batch], [w.queued_ns for w in batch]
                    results = await loop.run_in_executor(self._executor, self._run, requests, queued_ns)
        finally:
            self._free += 1
            for waiting, result in zip(batch, results, strict=True):
                if waiting.future.done():
                    continue
                if isinstance(result, BatchResult):
                    waiting.future.set_result(result)
                else:
                    waiting.future.set_exception(result)
            if apart:
                self._queue.began(batch)
            else:
                self._expect_return(results)
            self._dispatch()

    def _expect_return(self, results: Sequence[BatchResult | Exception]) -> None:
        if len(results) > 1 and isinstance(last := results[-1], BatchResult):
            waiting = self._rows()
            expected = min(waiting + last.batch_rows, self._model.max_batch_rows)
            self._returning.answered(expected, waiting, last.end_ns - last.run_ns, time.monotonic_ns())

    def _rows(self) -> int:
        return sum([waiting.decoded.rows for waiting in self._queue])

    def _run_apart(self, batch: Sequence[QueuedRequest]) -> list[BatchResult | Exception]:
        """On a thread: runs one after the other the requests that still have a waiting caller."""
        results: list[BatchResult | Exception] = []
        start, rows = time.monotonic_ns(), 0
        for waiting in batch:
            waiting.begun = True
            if waiting.future.done() or (waiting.deadline is not None and waiting.deadline <= time.monotonic()):
                results.append(DeadlineExceededError("the deadline passed while the request waited for its turn"))
            else:
                results += self._run([waiting.decoded], [waiting.queued_ns])
                rows += waiting.decoded.rows
        if len(batch) > 1 and rows:
            self._learn((batch[0].decoded.signature, _APART_BITS), (time.monotonic_ns() - start) / rows)
        return results

    def _run(self, requests: Sequence[Decoded], queued_ns: Sequence[int]) -> list[BatchResult | Exception]:
        """On any thread: concatenates, runs and splits. A failed batch is halved, so that a bad request fails alone."""
        start = time.monotonic_ns()
        first = requests[0]
        try:
            if len(requests) == 1:
                inputs = first.arrays
            else:
                inputs = {name: np.concatenate([decoded.arrays[name] for decoded in requests]) for name in first.arrays}
            run, cpu = time.monotonic_ns(), time.thread_time_ns()
            with self._watch:
                outputs = self._model.run(inputs, first.outputs)
            cpu = time.thread_time_ns() - cpu
            rows = sum([decoded.rows for decoded in requests])
            if len(requests) > 1 and any(len(output) != rows for output in outputs):
                raise InternalError(f"model {self._model.name!r} did not answer one row for each row of its inputs")
        except Exception as error:
            if len(requests) == 1:
                return [error]
            half = len(requests) // 2
            first_half = self._run(requests[:half], queued_ns[:half])  # compiled: halved at most 64 times
            return first_half + self._run(requests[half:], queued_ns[half:])  # compiled: likewise
        end = time.monotonic_ns()
        if isinstance(first.signature, tuple):  # a request that cannot share a run has another kind of signature
            self._learn((first.signature, rows.bit_length()), (end - run) / max(1, rows))
            if self._inline_runs is not None:
                self._inline_runs.ran(first, rows, end - run, cpu, outputs)
        results: list[BatchResult | Exception] = []
        # Every result carries the members. Without a bound, the cost would grow with the square of the batch size.
        members = b"".join([decoded.trace_context for decoded in requests[:MAX_MEMBERS]])
        row = 0
        shares = apportioned([max(1, decoded.rows) for decoded in requests], (end - start) // 1000)
        for decoded, queued, share in zip(requests, queued_ns, shares, strict=True):
            next_row = row + decoded.rows
            arrays = outputs if len(requests) == 1 else [output[row:next_row] for output in outputs]
            results.append(BatchResult(arrays, queued, start, run, end, len(requests), rows, row == 0, share, members))
            row = next_row
        return results

    def _learn(self, kind: tuple[Hashable, int], row_ns: float) -> None:
        known = self._row_ns.get(kind)
        if known is not None and row_ns < known / 2:
            known = None  # the earlier runs were a slow start
        elif known is None and len(self._row_ns) >= _MAX_KINDS:
            self._row_ns.clear()
        if known is not None:
            row_ns = known + (_FASTER if row_ns < known else _SLOWER) * (row_ns - known)
        self._row_ns[kind] = row_ns
