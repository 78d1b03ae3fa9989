"""Usage records as the ledger takes them: `ringmesh.ledger.v1.Batch`, a column for each field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ringmesh.ledger.v1 import ledger_pb2

FORMAT: Final = 1
_NO_TRACE = bytes(16)


class Dimension(NamedTuple):
    """What a record is about; its fields as those of the message."""

    tenant: str
    model: str
    version: str
    region: str
    worker_type: str
    outcome: str
    status: str


# Of each record: what they count is summed over the requests that it stands for.
COLUMNS: Final = (
    "at_ms",
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


class UsageColumns(NamedTuple):
    """Records. `dimension` has for each the place in `dimensions`, `columns` are COLUMNS; a trace id has 16 bytes, or
    none."""

    dimensions: Sequence[Dimension]
    dimension: Sequence[int]
    columns: Sequence[Sequence[int]]
    trace_ids: Sequence[bytes]


NOTHING: Final = UsageColumns((), (), ((),) * len(COLUMNS), ())


def encode(
    records: UsageColumns,
    worker_times: Iterable[ledger_pb2.WorkerTime] = (),
    dropped_records: int = 0,
    dropped_requests: int = 0,
    key_samples: Iterable[ledger_pb2.KeySample] = (),
) -> bytes:
    """A serialized Batch. The ledger accepts at most 50,000 records."""
    batch = ledger_pb2.Batch(
        format=FORMAT,
        worker_times=worker_times,
        key_samples=key_samples,
        dropped_records=dropped_records,
        dropped_requests=dropped_requests,
        dimension=records.dimension,
    )
    for name, column in zip(COLUMNS, records.columns, strict=True):
        # What is zero everywhere is left out.
        if any(column):
            getattr(batch, name).extend(column)
    if any(records.trace_ids):
        batch.trace_ids = b"".join([trace_id or _NO_TRACE for trace_id in records.trace_ids])
    for dimension in records.dimensions:
        batch.dimensions.add(**dimension._asdict())
    return batch.SerializeToString()


def is_empty(batch: bytes) -> bool:
    """Whether a serialized Batch holds nothing but what was dropped."""
    held = ledger_pb2.Batch.FromString(batch)
    return not (held.at_ms or held.worker_times or held.key_samples)
