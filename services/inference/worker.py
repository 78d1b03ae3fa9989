"""What a worker does with a request: join, decode, batch, run, encode."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ringmesh.inference.v1 import inference_pb2

from services.inference.codec.request import Decoded, names_shared_memory
from services.inference.codec.request_decoder import RequestDecoder
from services.inference.codec.shared_memory import SharedMemory
from services.inference.execution.inline_runs import MOST_BYTES_IN
from services.inference.models.held_models import HeldModel
from services.inference.models.memory_budget import ModelReplacedError
from services.inference.models.model_store import ModelStore
from services.inference.scheduling.batcher import Batcher, BatchResult
from services.inference.scheduling.load import Load
from services.inference.scheduling.request_queue import Waiting
from services.inference.work_results import answered, answered_together, encode, failed, is_large
from services.runtime import driver, faults
from services.runtime.driver import in_task
from services.runtime.errors import (
    DeadlineExceededError,
    ResourceExhaustedError,
    UnavailableError,
    kind_of,
)
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.large_result import Result, copy_of
from services.runtime.oip.infer_request import Parts, Read, RequestReader
from services.runtime.single_flight import SingleFlight

log = logging.getLogger(__name__)

# An envelope, which many share, is below 2 GiB: protobuf goes no further.
MAX_ENVELOPE_BYTES = (2 << 30) - (64 << 20)


class Work:
    """A serialized request; `deadline` in time.monotonic; `trace_context` is the router's span of it, as w3c.packed."""

    __slots__ = ("data", "deadline", "request_hash", "trace_context")

    def __init__(self, data: bytes, request_hash: bytes, deadline: float | None, trace_context: bytes) -> None:
        self.data = data
        self.request_hash = request_hash
        self.deadline = deadline
        self.trace_context = trace_context


class _Begun(NamedTuple):
    """`withdraw`: what to call when the caller has gone; None where the work goes on."""

    answer: asyncio.Future[Result]
    withdraw: Callable[[], object] | None
    start: int


class _Plain(NamedTuple):
    held: HeldModel
    batcher: Batcher
    waiting: Waiting
    answer: asyncio.Future[Result]


class _Execution:
    """Several at once; `done` hears the results when all are there."""

    def __init__(self, begun: Sequence[_Begun], done: Callable[[list[Result]], None]) -> None:
        self._begun = begun
        self._done: Callable[[list[Result]], None] | None = done
        self._left = len(begun)
        for answer, _, _ in begun:
            answer.add_done_callback(self._ended)
        if not begun:
            asyncio.get_running_loop().call_soon(self._all_ended)

    def cancel(self) -> None:
        """Nobody waits for it any more; `done` hears nothing."""
        self._done = None
        for answer, withdraw, _ in self._begun:
            if withdraw is not None:
                withdraw()
                answer.cancel()

    def _ended(self, one: asyncio.Future[Result]) -> None:
        self._left -= 1
        if not self._left:
            self._all_ended()

    def _all_ended(self) -> None:
        if self._done is None:
            return
        results: list[Result] = []
        room = MAX_ENVELOPE_BYTES
        for answer, _, start in self._begun:
            result = _result(answer, start)
            if len(result.response) > room:
                error = ResourceExhaustedError("too much was answered at once; retry later", kind="too_large")
                result = inference_pb2.WorkResult(failure=error.to_failure())
            room -= len(result.response)
            results.append(result)
        self._done(results)


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
        self._flights: SingleFlight[Result] = SingleFlight()
        # What leads each flight: a hash is only what a sender states.
        self._leaders: dict[bytes, Parts | bytes] = {}
        # Plain requests that have no answer, by their trace context.
        self._plain: dict[bytes, _Plain] = {}

    async def execute(
        self, data: bytes, *, request_hash: bytes, deadline: float | None, trace_context: bytes = b""
    ) -> Result:
        """The response without an id, or the failure. Requests in flight of one hash and the same bytes run once.

        The result's timing is enough to build the spans under the one that `trace_context` names.
        """
        start = time.time_ns()
        name = ""
        try:
            if len(data) > LARGE_BYTES:
                request = await asyncio.to_thread(self._reader.read, data)
            else:
                request = self._reader.read(data)
            name = request.head.name
            held = self.store.held.find(name, request.head.version)
            if key := self._join_key(held, request_hash, request):
                if key not in self._flights:
                    self._leaders[key] = request.content
                flying = self._flights.run(
                    key, lambda: in_task(self._lead(key, held, request, deadline, trace_context, start)), deadline
                )
                result, joined = await driver.run(flying, deadline)
                if joined:
                    result = copy_of(result)
                    result.timing.joined = True
            else:
                result = await self._run(held, request, deadline, trace_context, start)
        except Exception as error:
            told = faults.told(log, f"model {name} failed", error, trace_context[:16].hex())
            result = inference_pb2.WorkResult(failure=told.to_failure())
        result.timing.received_unix_ns = start
        result.timing.total_us = (time.time_ns() - start) // 1000
        return result

    async def execute_all(self, works: Sequence[Work]) -> list[Result]:
        """As `execute` each. Plain requests, which most are, are run without a task of their own."""
        ended: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()

        def done(results: list[Result]) -> None:
            if not ended.done():
                ended.set_result(results)

        cancel = self.begin_all(works, done)
        try:
            return await ended
        except asyncio.CancelledError:
            cancel()
            raise

    def begin_all(self, works: Sequence[Work], done: Callable[[list[Result]], None]) -> Callable[[], None]:
        """As `execute_all`, without a task; `done` hears the results later than this returns. What cancels it."""
        return _Execution([self._begin(work) for work in works], done).cancel

    def execute_at_once(self, works: Sequence[Work]) -> list[bytes] | None:
        """As `execute_all`, each serialized; None where it is not one quick run of plain requests of one model.

        On any thread.
        """
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
                ):
                    return None
                if names_shared_memory(request):
                    return None
                requests.append(self._decoder.decode(request, held.model, work.trace_context))
        except Exception:
            return None  # the other way says which of them is wrong
        if held is None or type(held.batcher) is not Batcher:
            return None
        batches = held.batcher.run_at_once(requests)
        if batches is None:
            return None
        self.load.answered_at_once(len(works))
        return answered_together(held, requests, batches, start)

    def withdraw(self, trace_contexts: Iterable[bytes]) -> int:
        """Nobody waits for these any more: those that have not begun to run, will not; how many that are.

        They fail. Whoever joined one runs it for himself. What is more than a plain request, is left to run.
        """
        withdrawn = 0
        for trace_context in trace_contexts:
            plain = self._plain.get(trace_context)
            if plain is not None and plain.batcher.withdraw(plain.waiting):
                # As if the time of who sent it were up.
                plain.answer.set_exception(DeadlineExceededError("nobody waits for it any more"))
                plain.held.statistics.withdrawn += 1
                withdrawn += 1
        return withdrawn

    def _begin(self, work: Work) -> _Begun:
        """Where it is not plain, a task of `execute`: large, equal to one in flight, more than a batch of one model."""
        start = time.time_ns()
        loop = asyncio.get_running_loop()
        if len(work.data) > LARGE_BYTES:
            return self._begin_task(work, start)
        held = None
        try:
            request = self._reader.read(work.data)
            held = self.store.held.find(request.head.name, request.head.version)
            key = self._join_key(held, work.request_hash, request)
            batcher = held.batcher
            if (
                type(batcher) is not Batcher
                or held.resident is not None
                or (key and key in self._flights)
                or names_shared_memory(request)
            ):
                return self._begin_task(work, start)
            decoded = self._decoder.decode(request, held.model, work.trace_context)
            waiting = batcher.enqueue(decoded, work.deadline)
        except Exception as error:
            if held is not None:
                held.statistics.failed(time.time_ns() - start, kind_of(error))
            refused = loop.create_future()
            refused.set_exception(error)
            return _Begun(refused, None, start)
        answer: asyncio.Future[Result] = loop.create_future()
        waiting.future.add_done_callback(partial(self._finish, held, decoded, start, answer))
        self.load.started()
        if work.trace_context:
            self._plain[work.trace_context] = _Plain(held, batcher, waiting, answer)
        if key:
            # Others may have joined it by the time its caller leaves.
            self._leaders[key] = request.content
            self._flights.lead(key, answer)
            answer.add_done_callback(partial(self._led, key))
            return _Begun(answer, None, start)
        return _Begun(answer, partial(batcher.withdraw, waiting), start)

    def _begin_task(self, work: Work, start: int) -> _Begun:
        executing = self.execute(
            work.data, request_hash=work.request_hash, deadline=work.deadline, trace_context=work.trace_context
        )
        task = asyncio.get_running_loop().create_task(executing)
        return _Begun(task, task.cancel, start)

    def _join_key(self, held: HeldModel, request_hash: bytes, request: Read) -> bytes:
        """What it may join or lead; b"" if it runs alone: no hash is stated, or other bytes are in flight under it."""
        if not request_hash:
            return b""
        key = held.model.digest + request_hash
        if key in self._flights and not request.is_equal(self._leaders.get(key)):
            return b""
        return key

    async def _lead(
        self, key: bytes, held: HeldModel, request: Read, deadline: float | None, trace_context: bytes, start: int
    ) -> Result:
        self._leaders[key] = request.content
        try:
            return await self._run(held, request, deadline, trace_context, start)
        finally:
            self._led(key)

    def _led(self, key: bytes, _: object = None) -> None:
        self._leaders.pop(key, None)

    async def _run(
        self,
        held: HeldModel,
        request: Read,
        deadline: float | None,
        trace_context: bytes,
        start: int,
        *,
        again: bool = False,
    ) -> Result:
        self.load.started()
        try:
            if len(request.data) > LARGE_BYTES or names_shared_memory(request):
                decoded = await asyncio.to_thread(self._decoder.decode, request, held.model, trace_context)
            else:
                decoded = self._decoder.decode(request, held.model, trace_context)
            batch = await held.submit(decoded, deadline)
            if is_large(batch):
                response = await asyncio.to_thread(encode, held, decoded, batch)
            else:
                response = encode(held, decoded, batch)
        except ModelReplacedError:
            if again:
                raise
            held = self.store.held.find(request.head.name, request.head.version)
            return await self._run(  # compiled: once
                held, request, deadline, trace_context, start, again=True
            )
        except Exception as error:
            held.statistics.failed(time.time_ns() - start, kind_of(error))
            raise
        finally:
            self.load.ended()
        return answered(held, decoded, batch, response, start)

    def _finish(
        self,
        held: HeldModel,
        decoded: Decoded,
        start: int,
        answer: asyncio.Future[Result],
        ran: asyncio.Future[BatchResult],
    ) -> None:
        """When the batch of a plain request has run."""
        self.load.ended()
        self._plain.pop(decoded.trace_context, None)
        if ran.cancelled() or answer.done():
            answer.cancel()
            return
        try:
            batch = ran.result()
            if is_large(batch):
                encoding = asyncio.get_running_loop().run_in_executor(None, encode, held, decoded, batch)
                encoding.add_done_callback(partial(self._encoded, held, decoded, batch, start, answer))
                return
            answer.set_result(answered(held, decoded, batch, encode(held, decoded, batch), start))
        except Exception as error:
            held.statistics.failed(time.time_ns() - start, kind_of(error))
            answer.set_exception(error)

    def _encoded(
        self,
        held: HeldModel,
        decoded: Decoded,
        batch: BatchResult,
        start: int,
        answer: asyncio.Future[Result],
        encoding: asyncio.Future[bytes],
    ) -> None:
        """When a large response has been encoded."""
        if encoding.cancelled() or answer.done():
            answer.cancel()
            return
        try:
            answer.set_result(answered(held, decoded, batch, encoding.result(), start))
        except Exception as error:
            held.statistics.failed(time.time_ns() - start, kind_of(error))
            answer.set_exception(error)


def _result(answer: asyncio.Future[Result], start: int) -> Result:
    """What it has, or its failure."""
    try:
        if answer.cancelled():
            raise UnavailableError("the worker is stopping")
        return answer.result()
    except Exception as error:
        return failed(error, start)
