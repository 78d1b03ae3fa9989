"""Row cache: a batch for a model with independent rows is answered row by row.

Rows that were requested before, alone or in another batch, come from the cache. The others are sent as one smaller
batch. Each row is cached under the key that it would have as a single-row request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher
from cache.mesh import Computed, Found, Mesh, Outcome
from cache.policy.worth_asking import Subject
from cache.tiers.entry import Entry
from router.admission.tenant_limits import TenantLimits
from router.balancing.catalog import ModelEntry
from router.dispatch.attempts import FatalRequestError
from router.request.local_answers import takes
from services.runtime import faults
from services.runtime.errors import RingmeshError, UnavailableError
from services.runtime.large_result import Result
from services.runtime.oip.tensors import DATATYPES, raw_from_contents
from services.runtime.single_flight import Flight
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# A larger batch is a bulk job; handling its rows one by one would block the event loop.
MAX_ROWS = 256

ComputeRows: TypeAlias = Callable[[bytes, bytes], Awaitable[tuple[Result, str]]]


class Batch(NamedTuple):
    """`request` is a request for one row, without data; `rows` holds the raw contents of each input, by row."""

    request: v2.ModelInferRequest
    rows: Sequence[Sequence[bytes]]


class _Query(NamedTuple):
    """A batch to look up. `indexes`: the keys of its rows, and one index of each."""

    batch: Batch
    indexes: Mapping[bytes, int]
    model: ModelEntry
    tenant: str | None
    subject: Subject
    compute: ComputeRows


class UnlikeRowsError(Exception):
    """The rows cannot be combined into one answer; the batch must be computed whole."""


class RowFailedError(Exception):
    """A batch failed with `error` before it computed this row: requests that joined it compute the row themselves."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def raise_fatal(error: Exception) -> None:
    """Raises errors that must also end the requests that joined: a retry of a fatal request would end more workers."""
    cause = error.error if isinstance(error, RowFailedError) else error
    if isinstance(cause, FatalRequestError):
        raise cause from None


class RowCache:
    """Finds the rows of batches in `mesh`. Computes a row in flight once, whether it is in a batch or a single request.

    Call it from driven coroutines.
    """

    def __init__(self, mesh: Mesh, hasher: RequestHasher, limits: TenantLimits | None = None) -> None:
        self._limits = limits
        self._mesh = mesh
        self._hasher = hasher
        self._flights = mesh.flights

    async def find(
        self,
        batch: Batch,
        model: ModelEntry,
        tenant: str | None,
        epochs: Epochs,
        whole: bytes,
        subject: Subject,
        compute: ComputeRows,
        owner: str = "",
    ) -> Found | None:
        """The answer to the batch and its source; None if the batch must be computed whole.

        `whole` is the key of the batch, `epochs` the current epochs, `subject` that of the batch. `compute` takes a
        serialized request and the hash that equal requests join by, and returns the result and the worker's id. Raises
        what `compute` raises. `owner`: the tenant whose share of the local tier the answers take.
        Cancelled: the computation of rows goes on, because others may wait for them.
        """
        hashes = self._hasher.hash_rows(batch.request, batch.rows, model.outputs, tenant)
        keys = [epochs.key(model.digest, model.name, row_hash) for row_hash in hashes]
        query = _Query(batch, {key: index for index, key in enumerate(keys)}, model, tenant, subject, compute)
        found = self._held(query)
        known = sum(key in found for key in keys)
        missing = [key for key in query.indexes if key not in found]
        flights = {key: flight for key in missing if (flight := self._flights.get(key)) is not None}
        try:
            found |= await self._lead(query, [key for key in missing if key not in flights])
            found |= await self._joined(flights)
            found |= await self._lead(query, [key for key in flights if key not in found])
            rows = [found[key] for key in keys]
            value = join([row.entry.value for row in rows])
        except UnlikeRowsError:
            return None
        answer = self._whole(rows, known, value, whole)
        self._charge(owner, whole, len(value), found)
        return answer

    def _held(self, query: _Query) -> dict[bytes, Found]:
        """The rows that are in the local tier."""
        found: dict[bytes, Found] = {}
        for key in query.indexes:
            entry = self._mesh.local.get(key)
            if (
                entry is not None
                and entry.created_at_ms >= self._mesh.purges.oldest_ms
                and takes(None, query.model, entry)
            ):
                found[key] = Found(entry, "hit-local")
        return found

    async def _joined(self, flights: Mapping[bytes, Flight[Found]]) -> dict[bytes, Found]:
        """The rows that others have computed; those that are missing must be computed here."""
        found: dict[bytes, Found] = {}
        for key, flight in flights.items():
            try:
                row = await flight
            except (RingmeshError, RowFailedError) as error:
                raise_fatal(error)
                continue  # perhaps because of the other caller's quota or deadline
            # Else it was computed by a newer model: an answer must not mix rows of two models.
            if self._mesh.local.peek(key) is row.entry:
                found[key] = Found(row.entry, "joined", row.worker)
        return found

    def _charge(self, owner: str, whole: bytes, size: int, rows: Mapping[bytes, Found]) -> None:
        """Counts the answer of `size` bytes, and the rows that were stored for it, for the tenant `owner`."""
        if self._limits is None:
            return
        self._limits.cache.keep(owner, whole, size)
        for key, row in rows.items():
            if row.outcome != "hit-local":
                self._limits.cache.keep(owner, key, len(row.entry.value))

    def _whole(self, rows: Sequence[Found], known: int, value: bytes, key: bytes) -> Found:
        """The combined answer, which is also stored in the local tier for the next time; Redis has the rows."""
        created = min(row.entry.created_at_ms for row in rows)
        self._mesh.local.put(key, Entry(value, sum(row.entry.compute_us for row in rows), created))
        outcomes = {row.outcome for row in rows}
        order: tuple[Outcome, ...] = ("miss", "joined", "hit-shared", "hit-local")
        outcome = next(outcome for outcome in order if outcome in outcomes)
        known += sum(row.outcome == "hit-shared" for row in rows)
        spent = sum(row.entry.compute_us for row in rows if outcome != "miss" or row.outcome == "miss")
        worker = next((row.worker for row in rows if row.outcome == "miss"), "")
        return Found(Entry(value, spent, created), outcome, worker, f"{known}/{len(rows)}")

    async def _lead(self, query: _Query, keys: Sequence[bytes]) -> dict[bytes, Found]:
        if not keys:
            return {}
        flights = {key: self._flights.begin(key) for key in keys}
        BACKGROUND.once("rows", partial(self._fly, query, flights))
        try:
            return {key: await flight for key, flight in flights.items()}
        except RowFailedError as failed:
            raise failed.error from None

    async def _fly(self, query: _Query, flights: Mapping[bytes, Flight[Found]]) -> None:
        """Ends all flights, with answers from the shared tier or from a worker."""
        landed: dict[bytes, Found] = {}
        failure: Exception = UnlikeRowsError()
        try:
            # Look-ups that start together share one round trip.
            decisions = {key: self._mesh.decide(key, query.subject) for key in flights}
            asked = [key for key, decision in decisions.items() if decision.asks]
            shared = await asyncio.gather(*(self._mesh.look_up(key, query.subject) for key in asked))
            landed = {
                key: Found(entry, "hit-shared")
                for key, entry in zip(asked, shared, strict=True)
                # A stale row is recomputed with the missing rows, at no additional call.
                if entry is not None and takes(None, query.model, entry)
            }
            if missing := [key for key in flights if key not in landed]:
                landed |= await self._compute(query, missing)
                for key in missing:
                    row = landed[key]
                    computed = Computed(row.entry, key, row.worker, query.model.freshness)
                    self._mesh.fill(computed, writes=decisions[key].asks)
        except UnlikeRowsError:
            pass
        except Exception as error:
            failure = faults.reported(log, f"rows of a batch for {query.model.name}", error)
        except asyncio.CancelledError:
            failure = UnavailableError("the router is stopping")
            raise
        finally:
            for key, flight in flights.items():
                flight.end(landed[key] if key in landed else RowFailedError(failure))

    async def _compute(self, query: _Query, keys: Sequence[bytes]) -> dict[bytes, Found]:
        model = query.model
        request = smaller(query.batch, [query.indexes[key] for key in keys])
        data = request.SerializeToString()
        start = time.monotonic()
        result, worker = await query.compute(data, self._hasher.hash(request, model.outputs, query.tenant))
        self._mesh.learn(query.subject, time.monotonic() - start)
        if result.model_digest != model.digest:
            raise UnlikeRowsError  # the model was replaced: an answer must not mix rows of two models
        compute_us = result.timing.compute_us // max(1, result.timing.batch_rows)
        return {
            key: Found(Entry(value, int(compute_us)), "miss", worker)
            for key, value in zip(keys, cut_response(result.response, len(keys)), strict=True)
        }


def split(request: v2.ModelInferRequest, most: int = 0) -> Batch | None:
    """Splits a request into rows, and removes the data from `request`.

    Returns None if it has one row or too many, or if only the worker can check it. The worker refuses more than `most`
    rows; 0: no limit.
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
    request = v2.ModelInferRequest()
    request.CopyFrom(batch.request)
    for index, tensor in enumerate(request.inputs):
        tensor.shape[0] = len(rows)
        request.raw_input_contents.append(b"".join([batch.rows[row][index] for row in rows]))
    return request


def cut_response(response: bytes, count: int) -> list[bytes]:
    """Splits a response into one per row. Raises UnlikeRowsError if an output does not have `count` rows."""
    whole = v2.ModelInferResponse.FromString(response)
    if len(whole.outputs) != len(whole.raw_output_contents):
        raise UnlikeRowsError
    columns = []
    for output, raw in zip(whole.outputs, whole.raw_output_contents, strict=True):
        column = _cut(raw, output.datatype, output.shape)
        if column is None or len(column) != count:
            raise UnlikeRowsError
        columns.append(column)
        output.shape[0] = 1
    if not columns:
        raise UnlikeRowsError
    del whole.raw_output_contents[:]
    # raw_output_contents are last on the wire, so each row has the same bytes as a worker's response.
    head = whole.SerializeToString()
    return [
        head + v2.ModelInferResponse(raw_output_contents=row).SerializeToString() for row in zip(*columns, strict=True)
    ]


def join(rows: Sequence[bytes]) -> bytes:
    """Joins the responses of rows, in order, into one. Raises UnlikeRowsError if they do not match."""
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
    """The bytes of each row; None if `raw` does not have the length that the shape requires."""
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
