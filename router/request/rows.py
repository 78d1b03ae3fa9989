"""Rows are requests too: a batch for a model whose rows are independent is answered row by row.

Rows that were asked for before, alone or in another batch, come from the cache; the rest leaves as one smaller batch.
Each row is filed under the key that it would have as a request of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher
from cache.mesh import Computed, Found, Mesh, Outcome
from cache.tiers.entry import Entry
from router.balancing.catalog import ModelEntry
from router.dispatch.attempts import FatalRequestError
from services.runtime import faults
from services.runtime.errors import RingmeshError, UnavailableError
from services.runtime.large_result import Result
from services.runtime.oip.tensors import DATATYPES, raw_from_contents
from services.runtime.single_flight import Flight
from services.runtime.telemetry.supervisor import BACKGROUND
from services.runtime.telemetry.tracing import untraced

log = logging.getLogger(__name__)

# Beyond it a batch is a bulk job, whose rows would only hold up the loop.
MAX_ROWS = 256

Compute: TypeAlias = Callable[[bytes, bytes], Awaitable[tuple[Result, str]]]


class Batch(NamedTuple):
    """`request` asks for one row, without its data; `rows` hold the raw contents of each input."""

    request: v2.ModelInferRequest
    rows: Sequence[Sequence[bytes]]


class UnlikeRowsError(Exception):
    """The rows do not make one answer; the batch must be computed whole."""


class RowFailedError(Exception):
    """A batch ended by `error` without this row: who joined it asks for the row by itself."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def raise_fatal(error: Exception) -> None:
    """Raises errors that must end the requests that joined too: a retry of a fatal request would end more workers."""
    cause = error.error if isinstance(error, RowFailedError) else error
    if isinstance(cause, FatalRequestError):
        raise cause from None


class RowCache:
    """Finds the rows of batches in `mesh`. A row in flight, in a batch or as a request of its own, is computed once.

    Its callers are driven coroutines.
    """

    def __init__(self, mesh: Mesh, hasher: RequestHasher) -> None:
        self._mesh = mesh
        self._hasher = hasher
        self._flights = mesh.flights
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(
        self,
        batch: Batch,
        model: ModelEntry,
        tenant: str | None,
        epochs: Epochs,
        whole: bytes,
        compute: Compute,
    ) -> Found | None:
        """The answer to the whole, and from where; None where it must be computed whole.

        `whole` is the key of the whole, `epochs` the purges as of now. `compute` runs a serialized request, joined by a
        hash, and says who did. Raises what it raises. Cancelling it leaves the rows under way, for which others may
        wait.
        """
        hashes = self._hasher.hash_rows(batch.request, batch.rows, model.outputs, tenant)
        keys = [epochs.key(model.digest, model.name, row_hash) for row_hash in hashes]
        wanted = {key: index for index, key in enumerate(keys)}
        found: dict[bytes, Found] = {}
        for key in wanted:
            entry = self._mesh.local.get(key)
            if entry is not None and entry.created_at_ms >= self._mesh.purges.oldest_ms and _is_fresh(model, entry):
                found[key] = Found(entry, "hit-local")
        known = sum(key in found for key in keys)
        missing = [key for key in wanted if key not in found]
        joined = {key: flight for key in missing if (flight := self._flights.get(key)) is not None}
        try:
            mine = [key for key in missing if key not in joined]
            found |= await self._lead(batch, model, mine, wanted, tenant, compute)
            failed = []
            for key, flight in joined.items():
                try:
                    row = await flight
                except (RingmeshError, RowFailedError) as error:
                    raise_fatal(error)
                    failed.append(key)  # their caller's quota or deadline may have ended it, not ours
                    continue
                if self._mesh.local.peek(key) is row.entry:
                    found[key] = Found(row.entry, "joined", row.worker)
                else:
                    failed.append(key)  # computed by what has replaced the model: rows of two models are no answer
            if failed:
                found |= await self._lead(batch, model, failed, wanted, tenant, compute)
            rows = [found[key] for key in keys]
            value = join([row.entry.value for row in rows])
        except UnlikeRowsError:
            return None
        return self._whole(rows, known, value, whole)

    def _whole(self, rows: Sequence[Found], known: int, value: bytes, key: bytes) -> Found:
        """Kept in this process too, for the next time: Redis has the rows."""
        created = min(row.entry.created_at_ms for row in rows)
        self._mesh.local.put(key, Entry(value, sum(row.entry.compute_us for row in rows), created))
        outcomes = {row.outcome for row in rows}
        order: tuple[Outcome, ...] = ("miss", "joined", "hit-shared", "hit-local")
        outcome = next(outcome for outcome in order if outcome in outcomes)
        known += sum(row.outcome == "hit-shared" for row in rows)
        spent = sum(row.entry.compute_us for row in rows if outcome != "miss" or row.outcome == "miss")
        worker = next((row.worker for row in rows if row.outcome == "miss"), "")
        return Found(Entry(value, spent, created), outcome, worker, f"{known}/{len(rows)}")

    async def _lead(
        self,
        batch: Batch,
        model: ModelEntry,
        keys: Sequence[bytes],
        wanted: Mapping[bytes, int],
        tenant: str | None,
        compute: Compute,
    ) -> dict[bytes, Found]:
        if not keys:
            return {}
        flights = {key: self._flights.begin(key) for key in keys}
        task = BACKGROUND.once("rows", self._fly(batch, model, flights, wanted, tenant, compute))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return {key: await flight for key, flight in flights.items()}
        except RowFailedError as failed:
            raise failed.error from None

    async def _fly(
        self,
        batch: Batch,
        model: ModelEntry,
        flights: Mapping[bytes, Flight[Found]],
        wanted: Mapping[bytes, int],
        tenant: str | None,
        compute: Compute,
    ) -> None:
        """Lands all flights, in the shared tier or on a worker."""
        landed: dict[bytes, Found] = {}
        failure: Exception = UnlikeRowsError()
        try:
            # Started together, the look-ups leave as one round trip.
            trace = untraced()
            shared = await asyncio.gather(*(self._mesh.look_up(key, trace) for key in flights))
            landed = {
                key: Found(entry, "hit-shared")
                for key, entry in zip(flights, shared, strict=True)
                if entry is not None and _is_fresh(model, entry)
            }
            if missing := [key for key in flights if key not in landed]:
                landed |= await self._compute(batch, model, missing, wanted, tenant, compute)
        except UnlikeRowsError:
            pass
        except Exception as error:
            failure = faults.told(log, f"rows of a batch for {model.name}", error)
        except asyncio.CancelledError:
            failure = UnavailableError("the router is stopping")
            raise
        finally:
            for key, flight in flights.items():
                flight.end(landed[key] if key in landed else RowFailedError(failure))

    async def _compute(
        self,
        batch: Batch,
        model: ModelEntry,
        keys: Sequence[bytes],
        wanted: Mapping[bytes, int],
        tenant: str | None,
        compute: Compute,
    ) -> dict[bytes, Found]:
        request = smaller(batch, [wanted[key] for key in keys])
        data = request.SerializeToString()
        result, worker = await compute(data, self._hasher.hash(request, model.outputs, tenant))
        if result.model_digest != model.digest:
            raise UnlikeRowsError  # replaced meanwhile: rows of two models are no answer
        compute_us = result.timing.compute_us // max(1, result.timing.batch_rows)
        rows = {
            key: Found(Entry(value, int(compute_us)), "miss", worker)
            for key, value in zip(keys, cut_response(result.response, len(keys)), strict=True)
        }
        for key, row in rows.items():
            self._mesh.fill(Computed(row.entry, key, row.worker, model.freshness))
        return rows


def _is_fresh(model: ModelEntry, entry: Entry) -> bool:
    """What is stale is computed with the rows that are missing: it costs no call of its own."""
    freshness = model.freshness
    return freshness is None or not freshness.is_stale(entry.created_at_ms, time.time_ns() // 1_000_000)


def split(request: v2.ModelInferRequest, most: int = 0) -> Batch | None:
    """Takes the data out of `request`. None where it has one row or too many, or where only the worker can judge.

    The worker refuses more rows than `most`; 0: it takes any number.
    """
    tensors = request.inputs
    counts = {tensor.shape[0] if tensor.shape else 0 for tensor in tensors}
    if len(counts) != 1 or any(output.parameters for output in request.outputs):
        return None
    count = counts.pop()
    raws: Sequence[bytes] = [*request.raw_input_contents]
    if not 2 <= count <= min(MAX_ROWS, most or MAX_ROWS) or (raws and len(raws) != len(tensors)):
        return None
    columns = []
    for index, tensor in enumerate(tensors):
        raw = raws[index] if raws else raw_from_contents(tensor)
        column = _cut(raw, tensor.datatype, tensor.shape)
        if column is None:
            return None
        columns.append(column)
        tensor.shape[0] = 1
        tensor.ClearField("contents")
    del request.raw_input_contents[:]
    request.ClearField("id")
    return Batch(request, list(zip(*columns, strict=True)))


def smaller(batch: Batch, rows: Sequence[int]) -> v2.ModelInferRequest:
    """The request for these rows of the batch."""
    request = v2.ModelInferRequest()
    request.CopyFrom(batch.request)
    for index, tensor in enumerate(request.inputs):
        tensor.shape[0] = len(rows)
        request.raw_input_contents.append(b"".join([batch.rows[row][index] for row in rows]))
    return request


def cut_response(response: bytes, count: int) -> list[bytes]:
    """A response for each row. Raises UnlikeRowsError where an output does not have `count` rows."""
    whole = v2.ModelInferResponse.FromString(response)
    columns = []
    for output, raw in zip(whole.outputs, whole.raw_output_contents, strict=True):
        column = _cut(raw, output.datatype, output.shape)
        if column is None or len(column) != count:
            raise UnlikeRowsError
        columns.append(column)
        output.shape[0] = 1
    del whole.raw_output_contents[:]
    # raw_output_contents come last on the wire, so that a row is written as a worker writes it.
    head = whole.SerializeToString()
    return [
        head + v2.ModelInferResponse(raw_output_contents=row).SerializeToString() for row in zip(*columns, strict=True)
    ]


def join(rows: Sequence[bytes]) -> bytes:
    """One response from those of its rows, in order. Raises UnlikeRowsError where they do not fit together."""
    parsed = [v2.ModelInferResponse.FromString(row) for row in rows]
    whole = parsed[0]
    heads = [[(output.name, output.datatype, output.shape[1:]) for output in row.outputs] for row in parsed]
    if any(head != heads[0] for head in heads):
        raise UnlikeRowsError
    raws = [b"".join(column) for column in zip(*(row.raw_output_contents for row in parsed), strict=True)]
    whole.raw_output_contents[:] = raws
    for output in whole.outputs:
        output.shape[0] = len(rows)
    return whole.SerializeToString()


def _cut(raw: bytes, datatype: str, shape: Sequence[int]) -> list[bytes] | None:
    """The bytes of each row; None where there are more or fewer than the shape says."""
    kind = DATATYPES.get(datatype)
    if kind is None or not shape or any(size < 0 for size in shape):
        return None
    count, elements = shape[0], 1
    for size in shape[1:]:
        elements *= size
    if kind.itemsize:
        size = kind.itemsize * elements
        return [raw[row * size : (row + 1) * size] for row in range(count)] if len(raw) == count * size else None
    rows = []
    position = start = 0
    for _ in range(count):
        for _ in range(elements):
            position += 4 + int.from_bytes(raw[position : position + 4], "little")
            if position > len(raw):
                return None
        rows.append(raw[start:position])
        start = position
    return rows if position == len(raw) else None
