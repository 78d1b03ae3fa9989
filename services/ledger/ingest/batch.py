"""A batch as a router sends it, checked and turned into columns."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.storage.kinds import UsageKind
from services.ledger.storage.times import MINUTE_MS
from services.ledger.storage.usage_rows import Integers
from services.runtime.errors import CODE_NAMES, FailedPreconditionError, InvalidArgumentError

FORMAT: Final = 1
MOST_RECORDS: Final = 50_000
_ENTRIES: Final = (
    ("at_ms", "records", MOST_RECORDS),
    ("dimensions", "dimensions", MOST_RECORDS),
    ("worker_times", "worker times", 10_000),
    ("key_samples", "key samples", 20_000),
)
_LONGEST_NAME = 256
_TRACE_BYTES = 16
_DIGEST_BYTES = 16
# Largest values of a record. Roll-ups hold the sum of 900,000 records that are that large.
_MOST = 10**13
_MOST_COUNT = 10**9
_SMALL: Final = {"requests": _MOST_COUNT, "batch_requests": _MOST_COUNT, "batch_rows": _MOST_COUNT, "rows": _MOST_COUNT}
COLUMNS: Final = (
    "requests",
    "total_us",
    "router_us",
    "cache_us",
    "queue_us",
    "run_us",
    "compute_us",
    "saved_us",
    "batch_requests",
    "batch_rows",
    "rows",
    "request_bytes",
    "response_bytes",
)
# 2000-01-01 to 2200-01-01: beyond, it is no clock.
_FIRST_MS, _LAST_MS = 946_684_800_000, 7_258_118_400_000
_OUTCOMES: Final = frozenset(("", "hit-local", "hit-shared", "hit-peer", "hit-semantic", "joined", "miss", "bypass"))
_STATUSES: Final = frozenset(CODE_NAMES.values())


class Producer(NamedTuple):
    """One life of a router."""

    router_id: str
    start_epoch: int


class UsageSeries(NamedTuple):
    """What roll-ups tell apart."""

    tenant: str
    model: str
    version: str
    region: str
    worker_type: str


class WorkerMinute(NamedTuple):
    """Seconds of a minute in which a worker was up, as bits."""

    worker_id: str
    worker_type: str
    region: str
    at_ms: int
    seconds: int


class KeySample(NamedTuple):
    """Requests for a key, one of those whose first byte is less than `below`. Its series has no tenant."""

    series: UsageSeries
    at_ms: int
    key: int
    below: int
    cacheable: bool
    requests: int
    compute_us: int
    value_bytes: int


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """What was sent. `series` and `kinds` belong to the dimensions; arrays have an entry a record."""

    producer: Producer
    sequence: int
    digest: bytes
    series: tuple[UsageSeries, ...]
    kinds: tuple[UsageKind, ...]
    dimension: Integers
    at_ms: Integers
    columns: dict[str, Integers]
    trace_ids: bytes
    worker_minutes: tuple[WorkerMinute, ...]
    key_samples: tuple[KeySample, ...]
    dropped_records: int
    dropped_requests: int

    @property
    def records(self) -> int:
        return len(self.at_ms)


def read(request: ledger_pb2.AppendRequest) -> UsageBatch:
    """Raises InvalidArgumentError where it is not a batch, FailedPreconditionError where it is of a newer format."""
    check_name(request.router_id, "router_id")
    if not request.router_id:
        raise InvalidArgumentError("router_id is empty", field="router_id")
    for field in ("start_epoch", "sequence"):
        if not 0 < getattr(request, field) < 1 << 63:
            raise InvalidArgumentError(f"{field} is {getattr(request, field)}; it starts at 1", field=field)
    if blake3(request.batch).digest(_DIGEST_BYTES) != request.digest:
        raise InvalidArgumentError(
            f"batch {request.sequence} is damaged: its {len(request.batch)} bytes do not have the digest sent with it",
            field="digest",
            kind="damaged",
        )
    try:
        batch = ledger_pb2.Batch.FromString(request.batch)
    except DecodeError:
        raise InvalidArgumentError(f"batch {request.sequence} is not a serialized Batch", field="batch") from None
    if batch.format > FORMAT:
        raise FailedPreconditionError(
            f"batch {request.sequence} has format {batch.format}, this ledger reads up to {FORMAT}: upgrade it first",
            field="batch.format",
            kind="newer_format",
        )
    if batch.format < 1:
        raise InvalidArgumentError("batch.format is not set", field="batch.format")
    return _columns(request, batch)


def _columns(request: ledger_pb2.AppendRequest, batch: ledger_pb2.Batch) -> UsageBatch:
    for name, what, most in _ENTRIES:
        if (count := len(getattr(batch, name))) > most:
            raise InvalidArgumentError(f"the batch has {count} {what}; at most {most}", field=f"batch.{name}")
    at_ms = _array(batch.at_ms, "at_ms")
    count = len(at_ms)
    columns = {name: _column(batch, name, count) for name in ("dimension", *COLUMNS)}
    dimension = columns.pop("dimension")
    for wrong in np.flatnonzero((at_ms < _FIRST_MS) | (at_ms >= _LAST_MS))[:1]:
        raise InvalidArgumentError(f"record {wrong}: at_ms is {at_ms[wrong]}, which is no time", field="batch.at_ms")
    for wrong in np.flatnonzero(dimension >= len(batch.dimensions))[:1]:
        raise InvalidArgumentError(
            f"record {wrong}: dimension is {dimension[wrong]} of {len(batch.dimensions)}", field="batch.dimension"
        )
    if len(batch.trace_ids) not in (0, count * _TRACE_BYTES):
        raise InvalidArgumentError(
            f"trace_ids has {len(batch.trace_ids)} bytes for {count} records, and {_TRACE_BYTES} belong to each",
            field="batch.trace_ids",
        )
    for place, one in enumerate(batch.dimensions):
        for field, value in one.ListFields():
            check_name(value, f"batch.dimensions[{place}].{field.name}")
        if one.status not in _STATUSES:
            raise InvalidArgumentError(
                f"{one.status!r} is no name of a gRPC status", field=f"batch.dimensions[{place}].status"
            )
    return UsageBatch(
        Producer(request.router_id, request.start_epoch),
        request.sequence,
        request.digest,
        tuple(UsageSeries(one.tenant, one.model, one.version, one.region, one.worker_type) for one in batch.dimensions),
        tuple(UsageKind(one.outcome if one.outcome in _OUTCOMES else "other", one.status) for one in batch.dimensions),
        dimension,
        at_ms,
        columns,
        batch.trace_ids or bytes(count * _TRACE_BYTES),
        _worker_minutes(batch),
        _key_samples(batch),
        _dropped(batch, "dropped_records"),
        _dropped(batch, "dropped_requests"),
    )


def _array(values: object, name: str) -> Integers:
    # uint64 first: what does not fit is told, and does not wrap.
    array = np.array(values, dtype=np.uint64)
    if array.size and int(array.max()) >= 1 << 62:
        raise InvalidArgumentError(f"{name} holds {array.max()}, which is too large", field=f"batch.{name}")
    return array.astype(np.int64)


def _column(batch: ledger_pb2.Batch, name: str, count: int) -> Integers:
    column = _array(getattr(batch, name), name)
    if not column.size:
        return np.zeros(count, np.int64)
    if len(column) != count:
        raise InvalidArgumentError(f"{name} has {len(column)} entries for {count} records", field=f"batch.{name}")
    most = _SMALL.get(name, _MOST)
    for wrong in np.flatnonzero(column > most)[:1]:
        raise InvalidArgumentError(f"record {wrong}: {name} is {column[wrong]}; at most {most}", field=f"batch.{name}")
    return column


def _worker_minutes(batch: ledger_pb2.Batch) -> tuple[WorkerMinute, ...]:
    found = []
    for place, one in enumerate(batch.worker_times):
        field = f"batch.worker_times[{place}]"
        for name in ("worker_id", "worker_type", "region"):
            check_name(getattr(one, name), f"{field}.{name}")
        if not one.worker_id:
            raise InvalidArgumentError("worker_id is empty", field=f"{field}.worker_id")
        at_ms = one.minute * MINUTE_MS
        if one.seconds >> 60 or not _FIRST_MS <= at_ms < _LAST_MS:
            raise InvalidArgumentError("not the 60 seconds of a minute", field=field)
        found.append(WorkerMinute(one.worker_id, one.worker_type, one.region, at_ms, one.seconds))
    return tuple(found)


def _key_samples(batch: ledger_pb2.Batch) -> tuple[KeySample, ...]:
    found = []
    for place, one in enumerate(batch.key_samples):
        field = f"batch.key_samples[{place}]"
        for name in ("model", "version", "region", "worker_type"):
            check_name(getattr(one, name), f"{field}.{name}")
        numbers = (one.compute_us, one.value_bytes)
        if not (
            1 <= one.below <= 256
            and one.key >> 56 < one.below
            and 1 <= one.requests <= _MOST_COUNT
            and max(numbers) <= _MOST
            and _FIRST_MS <= one.at_ms < _LAST_MS
        ):
            raise InvalidArgumentError(f"no sample of a key: {one}", field=field)
        series = UsageSeries("", one.model, one.version, one.region, one.worker_type)
        # As PostgreSQL has it, signed.
        key = one.key - (one.key >> 63 << 64)
        found.append(KeySample(series, one.at_ms, key, one.below, one.cacheable, one.requests, *numbers))
    return tuple(found)


def _dropped(batch: ledger_pb2.Batch, name: str) -> int:
    value: int = getattr(batch, name)
    if value > _MOST:
        raise InvalidArgumentError(f"{name} is {value}; at most {_MOST}", field=f"batch.{name}")
    return value


def check_name(name: str, field: str) -> None:
    """Raises InvalidArgumentError."""
    if len(name) > _LONGEST_NAME:
        raise InvalidArgumentError(f"{field} has {len(name)} characters; at most {_LONGEST_NAME}", field=field)
    if not name.isprintable() and any(unicodedata.category(character) == "Cc" for character in name):
        raise InvalidArgumentError(f"{field} has control characters", field=field)
