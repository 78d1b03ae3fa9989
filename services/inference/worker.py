"""The path of a request through the worker: join, decode, batch, run, encode."""

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
from services.inference.scheduling.request_queue import QueuedRequest
from services.inference.work_results import build_results, failed, is_large, joined
from services.runtime import driver
from services.runtime.driver import ON_LOOP, in_task
from services.runtime.errors import DeadlineExceededError, InvalidArgumentError, kind_of
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import SplitResult
from services.runtime.oip.infer_request import Read, RequestReader, SplitRequest
from services.runtime.single_flight import SingleFlight


class _WithdrawnError(DeadlineExceededError):
    """The request was withdrawn. Its caller gets the status of a passed deadline."""


class Worker:
    """Runs requests on the held models. Independent of RPCs: results and failures are values."""

    def __init__(self, worker_id: str, store: ModelStore, shared_memory_prefix: str = "") -> None:
        self.worker_id = worker_id
        self.store = store
        self.memory = SharedMemory(shared_memory_prefix)
        self.accepting = True
        self._reader = RequestReader()
        self._decoder = RequestDecoder(self.memory)
        self.load = Load(time.monotonic)
        self._flights: SingleFlight[SplitResult] = SingleFlight()
        # The content of the request that leads each flight. Senders state the hash, so joining also compares content.
        self._leaders: dict[bytes, SplitRequest | bytes] = {}
        # Requests that wait in the queue of their model, by trace context.
        self._queued: dict[bytes, tuple[Batcher, QueuedRequest]] = {}

    async def execute(self, works: Sequence[Work]) -> list[SplitResult]:
        """Returns the results in the order of `works`. Each is a response without an id, or the request's failure.

        Must be run by a driver (services/runtime/driver.py). Quick runs are made on the event loop, all others on
        threads. Concurrent requests with one hash and equal bytes run once. If cancelled, requests that have not begun
        do not run, except those with a hash: other requests may have joined them.
        """
        results = self._run_inline(works)
        if results is None:
            await ON_LOOP
            results = await run_all([self._request(work) for work in works])
        return results

    def _run_inline(self, works: Sequence[Work]) -> list[SplitResult] | None:
        """Runs `works` on the event loop; None unless they are one quick run of plain requests of one model."""
        start = time.monotonic_ns()
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
            return None  # the requests then run one by one, and only the invalid one fails
        if held is None or type(held.batcher) is not Batcher:
            return None
        batches = held.batcher.run_at_once(requests)
        if batches is None:
            return None
        self.load.answered_at_once(len(works))
        return build_results(held, requests, batches, start)

    async def _request(self, work: Work) -> SplitResult:
        start = time.monotonic_ns()
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
            # A request that joins waits until its own deadline. The queue watches the deadline of the leader.
            joining = self._flights.run(key, lambda: self._run(key, held, request, work, start), work.deadline)
            result, is_joined = await driver.run(joining, work.deadline)
            return joined(result, start) if is_joined else result
        except Exception as error:
            return failed(error, start, name, work.trace_context)

    def _join_key(self, held: HeldModel, request_hash: bytes, request: Read) -> bytes:
        """The flight to join or lead; b"" if the request runs alone: it has no hash, or the flight has other bytes."""
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
            held.statistics.failed(time.monotonic_ns() - start, kind_of(error))
            if isinstance(error, InvalidArgumentError):
                error.model_digest = held.model.digest
            raise
        finally:
            if key:
                self._leaders.pop(key, None)

    async def _batch(self, held: HeldModel, decoded: Decoded, deadline: float | None) -> BatchResult:
        """Waits for the run. Plain requests can be withdrawn and need no asyncio task."""
        batcher = held.batcher
        waiting: QueuedRequest | None = None
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
        """Cancels those requests that have not begun to run, and returns how many they are.

        They fail with DeadlineExceededError. A request that had joined one of them runs itself. Requests of sequences,
        of ensembles and of models under a memory budget are not cancelled.
        """
        withdrawn = 0
        for trace_context in trace_contexts:
            queued = self._queued.get(trace_context)
            if queued is not None and queued[0].withdraw(queued[1]):
                withdrawn += 1
        return withdrawn
