"""What a worker does with a request: join, decode, batch, run, encode."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import time
from collections.abc import Iterable, Sequence

from services.inference.codec.request import Decoded, names_shared_memory
from services.inference.codec.request_decoder import RequestDecoder
from services.inference.codec.shared_memory import SharedMemory
from services.inference.envelope import Work, run_all
from services.inference.execution.inline_runs import MOST_BYTES_IN
from services.inference.models.held_models import HeldModel
from services.inference.models.memory_budget import ModelReplacedError
from services.inference.models.model_store import ModelStore
from services.inference.scheduling.batcher import Batcher, BatchResult
from services.inference.scheduling.load import Load
from services.inference.scheduling.request_queue import Waiting
from services.inference.work_results import build_results, failed, is_large, joined
from services.runtime import driver
from services.runtime.driver import ON_LOOP, in_task
from services.runtime.errors import DeadlineExceededError, kind_of
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import SplitResult
from services.runtime.oip.infer_request import Parts, Read, RequestReader
from services.runtime.single_flight import SingleFlight


class _WithdrawnError(DeadlineExceededError):
    """To its caller as if the time were up."""


class Worker:
    """Runs requests on the models held. Knows no RPC: results and failures are values."""

    def __init__(self, worker_id: str, store: ModelStore) -> None:
        self.worker_id = worker_id
        self.store = store
        self.memory = SharedMemory()
        self.accepting = True
        self._reader = RequestReader()
        self._decoder = RequestDecoder(self.memory)
        self.load = Load(time.monotonic)
        self._flights: SingleFlight[SplitResult] = SingleFlight()
        # What leads each flight: a hash is only what a sender states.
        self._leaders: dict[bytes, Parts | bytes] = {}
        # What waits in the queue of its model, by trace context.
        self._queued: dict[bytes, tuple[Batcher, Waiting]] = {}

    async def execute(self, works: Sequence[Work]) -> list[SplitResult]:
        """The results in the order of `works`: a response without an id, or the failure of this request.

        To be driven, on any thread. What is quick runs on that thread, the rest from the event loop. Requests under way
        of one hash and the same bytes run once. Cancelled, what does not run yet will not, unless it has a hash: others
        may have joined it.
        """
        results = self._run_inline(works)
        if results is None:
            await ON_LOOP
            results = await run_all([self._request(work) for work in works])
        return results

    def _run_inline(self, works: Sequence[Work]) -> list[SplitResult] | None:
        """None where it is not one quick run of plain requests of one model."""
        start = time.time_ns()
        held: HeldModel | None = None
        requests = []
        if sum([len(work.data) for work in works]) > MOST_BYTES_IN:
            return None
        try:
            for work in works:
                request = self._reader.read(work.data)
                found = self.store.held.find(request.head.name, request.head.version)
                held = held or found
                if (
                    found is not held
                    or type(held.batcher) is not Batcher
                    or held.resident is not None
                    or not held.batcher.is_quick
                    or (work.request_hash and held.model.digest + work.request_hash in self._flights)
                    or (work.deadline is not None and work.deadline <= time.monotonic())
                    or names_shared_memory(request)
                ):
                    return None
                requests.append(self._decoder.decode(request, held.model, work.trace_context))
        except Exception:
            return None  # run one by one, the wrong request fails alone
        if held is None or type(held.batcher) is not Batcher:
            return None
        batches = held.batcher.run_at_once(requests)
        if batches is None:
            return None
        self.load.answered_at_once(len(works))
        return build_results(held, requests, batches, start)

    async def _request(self, work: Work) -> SplitResult:
        """One request of an envelope, on the event loop."""
        start = time.time_ns()
        name = ""
        try:
            read = self._reader.read
            request = await asyncio.to_thread(read, work.data) if len(work.data) > LARGE_BYTES else read(work.data)
            name = request.head.name
            held = self.store.held.find(name, request.head.version)
            key = self._join_key(held, work.request_hash, request)
            if not key:
                return await self._run(b"", held, request, work, start)
            if key not in self._flights:
                return await self._flights.start(key, self._run(key, held, request, work, start))
            # Until its own time is up; the time of what runs is the queue's to watch.
            joining = self._flights.run(key, lambda: self._run(key, held, request, work, start), work.deadline)
            result, is_joined = await driver.run(joining, work.deadline)
            return joined(result, start) if is_joined else result
        except Exception as error:
            return failed(error, start, name, work.trace_context)

    def _join_key(self, held: HeldModel, request_hash: bytes, request: Read) -> bytes:
        """What it may join or lead; b"" if it runs alone: no hash is stated, or other bytes are in flight under it."""
        if not request_hash:
            return b""
        key = held.model.digest + request_hash
        if key in self._flights and not request.is_equal(self._leaders.get(key)):
            return b""
        return key

    async def _run(
        self, key: bytes, held: HeldModel, request: Read, work: Work, start: int, *, again: bool = False
    ) -> SplitResult:
        if key:
            self._leaders[key] = request.content
        try:
            decode = self._decoder.decode
            if len(request.data) > LARGE_BYTES or names_shared_memory(request):
                decoded = await asyncio.to_thread(decode, request, held.model, work.trace_context)
            else:
                decoded = decode(request, held.model, work.trace_context)
            batch = await self._batch(held, decoded, work.deadline)
            if is_large(batch):
                return (await asyncio.to_thread(build_results, held, [decoded], [batch], start))[0]
            return build_results(held, [decoded], [batch], start)[0]
        except ModelReplacedError:
            if again:
                raise
            held = self.store.held.find(request.head.name, request.head.version)
            return await self._run(key, held, request, work, start, again=True)  # compiled: once
        except _WithdrawnError:
            held.statistics.withdrawn += 1
            raise
        except Exception as error:
            held.statistics.failed(time.time_ns() - start, kind_of(error))
            raise
        finally:
            if key:
                self._leaders.pop(key, None)

    async def _batch(self, held: HeldModel, decoded: Decoded, deadline: float | None) -> BatchResult:
        """Waits for the run. Plain requests can be withdrawn, and need no task."""
        batcher = held.batcher
        waiting: Waiting | None = None
        if type(batcher) is Batcher and held.resident is None:
            waiting = batcher.enqueue(decoded, deadline)
            if decoded.trace_context:
                self._queued[decoded.trace_context] = batcher, waiting
        self.load.started()
        try:
            if waiting is None:
                return await in_task(held.submit(decoded, deadline))
            batch: BatchResult = await waiting.future
            return batch
        except asyncio.CancelledError:
            if waiting is not None and type(batcher) is Batcher:
                if waiting.future.cancelled():
                    raise _WithdrawnError("nobody waits for it any more") from None
                batcher.leave(waiting)
            raise
        finally:
            self.load.ended()
            self._queued.pop(decoded.trace_context, None)

    def withdraw(self, trace_contexts: Iterable[bytes]) -> int:
        """Nobody waits for these any more: those that have not begun to run, will not; how many that are.

        They fail. Whoever joined one runs it for himself. What is more than a plain request, is left to run.
        """
        withdrawn = 0
        for trace_context in trace_contexts:
            queued = self._queued.get(trace_context)
            if queued is not None and queued[0].withdraw(queued[1]):
                withdrawn += 1
        return withdrawn
