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


class UsageRecord(NamedTuple):
    """A request, or several hits that were folded: all else is the sum over them. `trace_id` has 16 bytes, or none."""

    dimension: Dimension
    at_ms: int
    requests: int = 1
    total_us: int = 0
    router_us: int = 0
    cache_us: int = 0
    queue_us: int = 0
    run_us: int = 0
    compute_us: int = 0
    saved_us: int = 0
    batch_requests: int = 0
    batch_rows: int = 0
    rows: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    trace_id: bytes = b""


def encode(
    records: Sequence[UsageRecord],
    worker_times: Iterable[ledger_pb2.WorkerTime] = (),
    dropped_records: int = 0,
    dropped_requests: int = 0,
    key_samples: Iterable[ledger_pb2.KeySample] = (),
) -> bytes:
    """A serialized Batch. The ledger accepts at most 50,000 records."""
    numbers: dict[Dimension, int] = {}
    batch = ledger_pb2.Batch(
        format=FORMAT,
        worker_times=worker_times,
        key_samples=key_samples,
        dropped_records=dropped_records,
        dropped_requests=dropped_requests,
    )
    if records:
        dimensions, *columns, trace_ids = zip(*records, strict=True)
        batch.dimension.extend([numbers.setdefault(dimension, len(numbers)) for dimension in dimensions])
        for name, column in zip(UsageRecord._fields[1:-1], columns, strict=True):
            # What is zero everywhere is left out.
            if any(column):
                getattr(batch, name).extend(column)
        if any(trace_ids):
            batch.trace_ids = b"".join([trace_id or _NO_TRACE for trace_id in trace_ids])
        for dimension in numbers:
            batch.dimensions.add(**dimension._asdict())
    return batch.SerializeToString()
